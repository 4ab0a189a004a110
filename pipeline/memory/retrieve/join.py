"""The batched retrieval join: captions in, ranked documents out.

    bm25     the caption is the query over the documents' texts (what VIMI does)
    clip     the caption's CLIP vector against the documents' vectors (RA-CM3)
    hybrid   both, merged by exact reciprocal rank fusion

LanceDB answers one full-text or hybrid query at a time; here whole batches are answered from arrays.
For memories beyond `max_exact_documents` LanceDB's own indexes answer instead (`lance.py`).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pipeline.memory import Memory
from pipeline.memory.retrieve.bm25 import Bm25, Hits
from pipeline.memory.retrieve.config import RetrieveConfig
from pipeline.memory.retrieve.dense import Dense
from pipeline.memory.retrieve.documents import Documents
from pipeline.memory.retrieve.fuse import reciprocal_rank
from pipeline.memory.retrieve.partitions import Partitions

MIN_PARTITIONED = 20_000
"""Smaller memories are searched exactly: it takes milliseconds. Ours."""


class Search(Protocol):
    """Queries, their CLIP vectors (None for bm25), depth -> ranked documents of each."""

    def __call__(self, texts: Sequence[str], vectors: np.ndarray | None, depth: int, /) -> list[Hits]: ...


class ArraySearch:
    """Search over arrays: exact, or with partitions held to a recall.

    Args:
        config: retriever and its constants.
        bm25: index of the texts.
        vectors: float `n d`, what the query vector is compared with.
        asked: float `m d`, vectors of the kind that will ask, to tune partitions on; None = `vectors`.
    """

    def __init__(
        self, config: RetrieveConfig, bm25: Bm25, vectors: np.ndarray, asked: np.ndarray | None = None
    ) -> None:
        self.config, self.bm25 = config, bm25
        self.dense: Dense | Partitions | None = None
        if config.retriever != "bm25" and config.engine == "partitions" and len(vectors) > MIN_PARTITIONED:
            self.dense = Partitions.build(vectors).tuned(
                vectors if asked is None else asked, recall=config.recall
            )
        elif config.retriever != "bm25":
            self.dense = Dense(vectors)

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
        return ArraySearch(config, documents.bm25, vectors, documents.text)
    from pipeline.memory.retrieve.lance import LanceSearch

    return LanceSearch(config, documents, memory)


def uses_arrays(config: RetrieveConfig, num_documents: int) -> bool:
    """Exact search in memory, or LanceDB's indexes?"""
    if config.engine == "auto":
        return num_documents <= config.max_exact_documents
    return config.engine != "lance"
