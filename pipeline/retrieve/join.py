"""The batched retrieval join: captions in, ranked documents out.

    bm25     the caption is the query over the documents' texts (what VIMI does)
    clip     the caption's CLIP vector against the documents' vectors (RA-CM3)
    hybrid   both, merged by exact reciprocal rank fusion

LanceDB answers one full-text or hybrid query at a time; here whole batches are answered from arrays.
For memories beyond `max_exact_documents` LanceDB's own indexes answer instead (`lance.py`).
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from pydantic import Field

from infra.config import Config
from pipeline.memory import Memory
from pipeline.retrieve.bm25 import K1, B, Bm25, Hits
from pipeline.retrieve.dense import Dense
from pipeline.retrieve.documents import Documents
from pipeline.retrieve.fuse import RRF_K, reciprocal_rank

Retriever = Literal["bm25", "clip", "hybrid"]


class RetrieveConfig(Config):
    """How a caption finds its documents."""

    retriever: Retriever = "bm25"
    """bm25 is what VIMI does; clip and hybrid are ours."""
    k: int = Field(default=5, ge=0)
    """Documents stored in each prompt, best first; how many are used is drawn when training loads the
    row. VIMI's k is not published; RA-CM3 uses up to 2, CM3Leon draws 3 of a list, RAGME takes 10."""
    depth: int = Field(default=100, ge=1)
    """Candidates that the guard chooses from; deepened by itself where too few survive. Ours."""
    k1: float = Field(default=K1, ge=0)
    """BM25's saturation of repeated words. Default of Lucene, Tantivy and Lance."""
    b: float = Field(default=B, ge=0, le=1)
    """BM25's length normalisation. Default of Lucene, Tantivy and Lance."""
    rrf_k: int = Field(default=RRF_K, ge=0)
    """Constant of reciprocal rank fusion (Cormack et al. 2009)."""
    bm25_weight: float = Field(default=1.0, ge=0)
    """Weight of the BM25 list in hybrid; 1 each is the paper's plain sum."""
    clip_weight: float = Field(default=1.0, ge=0)
    """Weight of the CLIP list in hybrid."""
    against: Literal["document", "image", "text"] = "document"
    """Which vector of a document the caption is compared with. RA-CM3: document, the unit mean of
    picture and text."""
    query_dropout_frac: float = Field(default=0.0, ge=0, lt=1)
    """Share of the caption's words dropped from the query (RA-CM3 trains with 0.2; VIMI: not said)."""
    max_chosen_similarity: float = Field(default=0.9, gt=0, le=1)
    """A candidate whose picture is closer (cosine) than this to one already chosen is skipped.
    RA-CM3: 0.9. 1 = never."""
    mmr_lambda: float = Field(default=1.0, ge=0, le=1)
    """Maximal marginal relevance (Carbonell & Goldstein 1998): 1 = by score alone."""
    engine: Literal["auto", "arrays", "lance"] = "auto"
    """arrays = exact, in memory; lance = the table's own indexes; auto = arrays up to
    `max_exact_documents`."""
    max_exact_documents: int = Field(default=3_000_000, ge=0)
    """Memories beyond this are searched through LanceDB's indexes (ours: about 3 GB per machine and
    million documents at 512 dimensions)."""


class Search(Protocol):
    """Queries, their CLIP vectors (None for bm25), depth -> ranked documents of each."""

    def __call__(self, texts: Sequence[str], vectors: np.ndarray | None, depth: int, /) -> list[Hits]: ...


class ArraySearch:
    """Exact search over arrays.

    Args:
        config: retriever and its constants.
        bm25: index of the texts.
        vectors: float `n d`, what the query vector is compared with.
    """

    def __init__(self, config: RetrieveConfig, bm25: Bm25, vectors: np.ndarray) -> None:
        self.config, self.bm25 = config, bm25
        self.dense = Dense(vectors) if config.retriever != "bm25" else None

    def __call__(self, texts: Sequence[str], vectors: np.ndarray | None, depth: int, /) -> list[Hits]:
        """The `depth` best documents of each query.

        Args:
            texts: queries.
            vectors: float32 `q d`, their CLIP vectors; None for bm25.
            depth: documents wanted of each.
        """
        if self.dense is None or vectors is None:
            return self.bm25.search(texts, depth)
        by_vector = self.dense.search(vectors, depth)
        if self.config.retriever == "clip":
            return by_vector
        weights = (self.config.bm25_weight, self.config.clip_weight)
        return [
            reciprocal_rank(pair, depth, weights=weights, k=self.config.rrf_k)
            for pair in zip(self.bm25.search(texts, depth), by_vector, strict=True)
        ]


def open_search(config: RetrieveConfig, documents: Documents, memory: Memory) -> Search:
    """The search that the config asks for, ready for batches."""
    if uses_arrays(config, len(documents)):
        vectors = {
            "document": documents.document,
            "image": documents.image,
            "text": documents.text,
        }[config.against]
        return ArraySearch(config, documents.bm25, vectors)
    from pipeline.retrieve.lance import LanceSearch

    return LanceSearch(config, documents, memory)


def uses_arrays(config: RetrieveConfig, num_documents: int) -> bool:
    """Exact search in memory, or LanceDB's indexes?"""
    if config.engine == "auto":
        return num_documents <= config.max_exact_documents
    return config.engine == "arrays"
