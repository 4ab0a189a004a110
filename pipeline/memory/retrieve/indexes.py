"""Search backends of the retrievers: exact over arrays in memory, or LanceDB's indexes.

LanceDB answers one full-text query at a time and has no hybrid batches; arrays answer whole batches.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from infra.errors import ConfigError
from pipeline.memory import Memory
from pipeline.memory.retrieve.bm25 import Hits, ranked
from pipeline.memory.retrieve.dense import Dense
from pipeline.memory.retrieve.documents import Documents
from pipeline.memory.retrieve.retrievers import RetrieveConfig
from pipeline.memory.vectors import setting_of, vector_search

MAX_EXACT_DOCUMENTS = 3_000_000
"""Memories beyond this are searched through LanceDB's indexes. Ours: about 3 GB per machine and million
documents at 512 dimensions."""
FTS_THREADS = 4  # more threads gain nothing (measured)
Search = Callable[[Sequence[str], np.ndarray | None, int], list[Hits]]
"""Queries, their CLIP vectors (None where the retriever needs none), depth -> ranked documents of each."""


class ArrayIndex:
    """Exact answers from the memory's arrays; documents are numbers."""

    def __init__(self, documents: Documents, against: str) -> None:
        self.documents, self.against = documents, against

    @cached_property
    def dense(self) -> Dense:
        return Dense(getattr(self.documents, self.against))

    def by_words(self, texts: Sequence[str], depth: int) -> list[Hits]:
        return self.documents.bm25.search(texts, depth)

    def by_vectors(self, vectors: np.ndarray, depth: int) -> list[Hits]:
        found = self.dense.search(vectors, depth)
        return [hits if vector.any() else _nothing() for hits, vector in zip(found, vectors, strict=True)]


class LanceIndex:
    """Approximate vectors, exact BM25, by the table's indexes; documents are ids (bytes).

    Args:
        memory: an open memory.
        column: embedding column; searched with the setting whose recall the certificate proves.
        where: SQL filter, applied before the search.
    """

    def __init__(self, memory: Memory, column: str, where: str | None = None) -> None:
        self.table, self.column, self.where = memory.table, column, where
        self.setting = setting_of(memory.certificate.facts, column)

    def by_words(self, texts: Sequence[str], depth: int) -> list[Hits]:
        with ThreadPoolExecutor(FTS_THREADS) as pool:
            return list(pool.map(lambda text: self._by_text(text, depth), texts))

    def _by_text(self, text: str, depth: int) -> Hits:
        from lancedb.query import MatchQuery

        if not text.strip():
            return _nothing()
        match: Any = MatchQuery  # words, never parsed as a query language
        query = self.table.search(match(text, "text"), query_type="fts")
        query = query.where(self.where, prefilter=True) if self.where else query
        found = query.limit(depth).select(["doc_id", "_score"]).to_arrow()
        return _hits(found["doc_id"].to_pylist(), found["_score"].to_pylist(), depth)

    def by_vectors(self, vectors: np.ndarray, depth: int) -> list[Hits]:
        answers = vector_search(self.table, self.column, vectors, self.setting, k=depth, where=self.where)
        return [
            _hits([doc_id for doc_id, _ in answer], [score for _, score in answer], depth)
            if vector.any()
            else _nothing()
            for answer, vector in zip(answers, vectors, strict=True)
        ]


def _hits(doc_ids: list[str], scores: list[float], depth: int) -> Hits:
    return ranked(np.array(doc_ids, "S24"), np.array(scores, np.float64), depth)


def _nothing() -> Hits:
    return Hits(np.zeros(0, np.int32), np.zeros(0))


def open_search(config: RetrieveConfig, documents: Documents, memory: Memory) -> Search:
    """The search that the config asks for, ready for batches; documents are numbers.

    Raises:
        ConfigError: the table lacks an index.
    """
    method = config.method
    if uses_arrays(config, len(documents)):
        arrays = ArrayIndex(documents, config.against)
        return lambda texts, vectors, depth: method.search(arrays, texts, _or_empty(vectors, texts), depth)
    check_indexes(memory, config)
    table = LanceIndex(memory, f"{config.against}_embedding")

    def search(texts: Sequence[str], vectors: np.ndarray | None, depth: int) -> list[Hits]:
        found = method.search(table, texts, _or_empty(vectors, texts), depth)
        return [Hits(documents.find(hits.docs), hits.scores) for hits in found]

    return search


def _or_empty(vectors: np.ndarray | None, texts: Sequence[str]) -> np.ndarray:
    return np.zeros((len(texts), 0), np.float32) if vectors is None else vectors


def uses_arrays(config: RetrieveConfig, num_documents: int) -> bool:
    """Exact search in memory, or LanceDB's indexes?"""
    if config.engine == "auto":
        return num_documents <= MAX_EXACT_DOCUMENTS
    return config.engine == "arrays"


def check_indexes(memory: Memory, config: RetrieveConfig) -> None:
    """Refuse a table without the indexes, or with another analysis of words.

    Rows newer than an index are not hidden: LanceDB scans them.
    """
    there = str(memory.certificate.facts.get("analysis", "english"))
    if config.method.needs_words and there != config.analysis:
        raise ConfigError(
            f"retrieve.analysis = {config.analysis}, but the text index of {memory.uri} is {there}",
            legal="retrieve.engine = arrays, which needs no index",
            cure=f"set it to {there}, or build a memory with index.analysis={config.analysis}",
        )
    wanted = {"text": config.method.needs_words, f"{config.against}_embedding": config.method.needs_vectors}
    there = {index.columns[0] for index in memory.table.list_indices()}
    for column in sorted(column for column, is_wanted in wanted.items() if is_wanted):
        if column not in there:
            raise ConfigError(
                f"memory {memory.uri} has no index on {column}",
                legal="retrieve.engine = arrays needs none",
                cure="run `vimi-data build-index` again",
            )
