"""How a caption finds its documents: retrievers by name, over any index that answers to words and vectors.

    bm25     the caption is the query over the documents' texts (what VIMI does)
    clip     the caption's CLIP vector against the documents' vectors (RA-CM3)
    hybrid   both, merged by exact reciprocal rank fusion

Another one is an entry of `RETRIEVERS`; the config, the commands and the join ask for it by its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from pydantic import Field, field_validator

from infra.config import Config
from pipeline.memory.retrieve.analysis import Analysis
from pipeline.memory.retrieve.bm25 import Hits

RRF_K = 60
"""Constant of reciprocal rank fusion: Cormack, Clarke & Buettcher (2009); LanceDB's default as well."""


class Index(Protocol):
    """What a memory can be asked: a batch of queries, the `depth` best documents of each."""

    def by_words(self, texts: Sequence[str], depth: int) -> list[Hits]: ...

    def by_vectors(self, vectors: np.ndarray, depth: int) -> list[Hits]: ...


@dataclass(frozen=True)
class Retriever:
    """A way to rank the documents of a batch of queries."""

    search: Callable[[Index, Sequence[str], np.ndarray, int], list[Hits]]
    """(index, texts, their CLIP vectors float32 `q d`, or `q 0` where none are needed, depth) -> the `depth`
    best documents of each."""
    needs_words: bool = False
    """Asks for `by_words`: the table must have a full-text index."""
    needs_vectors: bool = False
    """Asks for `by_vectors`: queries are embedded, and the table must have a vector index."""


def reciprocal_rank(lists: Sequence[Hits], depth: int) -> Hits:
    """Reciprocal rank fusion: score(d) = sum over lists of 1 / (`RRF_K` + rank of d), exact.

    Args:
        lists: ranked documents, best first.
        depth: documents wanted.

    Returns:
        The best `depth`; equal scores in order of document.
    """
    docs = np.concatenate([hits.docs for hits in lists])
    gains = np.concatenate([1 / (RRF_K + 1 + np.arange(len(hits))) for hits in lists])
    unique, inverse = np.unique(docs, return_inverse=True)
    scores = np.bincount(inverse, gains, minlength=len(unique))
    order = np.lexsort((unique, -scores))[:depth]
    return Hits(unique[order], scores[order])


def _hybrid(index: Index, texts: Sequence[str], vectors: np.ndarray, depth: int) -> list[Hits]:
    pairs = zip(index.by_words(texts, depth), index.by_vectors(vectors, depth), strict=True)
    return [reciprocal_rank(pair, depth) for pair in pairs]


RETRIEVERS: dict[str, Retriever] = {
    "bm25": Retriever(lambda index, texts, _, depth: index.by_words(texts, depth), needs_words=True),
    "clip": Retriever(lambda index, _, vectors, depth: index.by_vectors(vectors, depth), needs_vectors=True),
    "hybrid": Retriever(_hybrid, needs_words=True, needs_vectors=True),
}
MAX_CHOSEN_SIMILARITY = 0.9
"""A candidate whose picture is closer (cosine) than this to one already chosen is skipped. RA-CM3: 0.9, as for
copies of the clip; so where the memory says that only more is a copy (`guard.similarity_bound`), that counts:
to a small CLIP half of all simple pictures are closer than 0.9."""


class RetrieveConfig(Config):
    """How a caption finds its documents."""

    retriever: str = "bm25"
    """bm25, clip, hybrid, or another name of `RETRIEVERS`. bm25 is what VIMI does; clip and hybrid are ours."""
    k: int = Field(default=5, ge=0, le=1000)
    """Documents stored in each prompt, best first; how many are used is drawn when training loads the
    row. VIMI's k is not published; RA-CM3 uses up to 2, CM3Leon draws 3 of a list, RAGME takes 10."""
    depth: int = Field(default=100, ge=1, le=100_000)
    """Candidates that the guard chooses from; deepened by itself where too few survive. Ours."""
    against: Literal["document", "image", "text"] = "document"
    """Which vector of a document the caption is compared with. RA-CM3: document, the unit mean of
    picture and text."""
    analysis: Analysis = "english"
    """What BM25 compares: Lucene's English analysis (no stop words, stems), a language whose Snowball stems are
    taken, or none: words as they stand. With LanceDB's index it must be the memory's `index.analysis`."""
    engine: Literal["auto", "arrays", "lance"] = "auto"
    """arrays = exact, in memory; lance = the table's own indexes; auto = arrays up to
    `MAX_EXACT_DOCUMENTS` documents."""

    @field_validator("retriever")
    @classmethod
    def _is_registered(cls, value: str) -> str:
        if value not in RETRIEVERS:
            raise ValueError(f"no such retriever; legal: {', '.join(RETRIEVERS)}")
        return value

    @property
    def method(self) -> Retriever:
        return RETRIEVERS[self.retriever]
