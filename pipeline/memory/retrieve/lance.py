"""Search through LanceDB's own indexes: for memories that don't fit the arrays' budget.

Vectors go in batches; full text goes one query at a time, on a few threads (LanceDB has no batched
full-text search). Words, stemming and stop words are those of the table's full-text index. Captions
are passed as terms, never parsed, so reserved characters are harmless.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from infra.errors import ConfigError
from pipeline.memory import Memory
from pipeline.memory.retrieve.bm25 import Hits, ranked
from pipeline.memory.retrieve.config import RetrieveConfig
from pipeline.memory.retrieve.documents import Documents
from pipeline.memory.retrieve.fuse import reciprocal_rank
from pipeline.memory.store import EMBEDDINGS
from pipeline.memory.vectors import setting_of, vector_search

THREADS = 4


class LanceSearch:
    """Approximate vectors, exact BM25, by the table's indexes.

    Raises:
        ConfigError: the table lacks an index.
    """

    def __init__(self, config: RetrieveConfig, documents: Documents, memory: Memory) -> None:
        self.config, self.documents, self.table = config, documents, memory.table
        facts = memory.certificate.facts
        self.settings = {column: setting_of(facts, column) for column in EMBEDDINGS}
        check_indexes(memory, config)

    def __call__(self, texts: Sequence[str], vectors: np.ndarray | None, depth: int, /) -> list[Hits]:
        """The `depth` best documents of each query."""
        lists = []
        if self.config.retriever != "clip":
            with ThreadPoolExecutor(THREADS) as pool:
                lists.append(list(pool.map(lambda text: self._by_text(text, depth), texts)))
        if self.config.retriever != "bm25" and vectors is not None:
            lists.append(self._by_vectors(vectors, depth))
        if len(lists) == 1:
            return lists[0]
        weights = (self.config.bm25_weight, self.config.clip_weight)
        return [
            reciprocal_rank(pair, depth, weights=weights, k=self.config.rrf_k)
            for pair in zip(*lists, strict=True)
        ]

    def _by_text(self, text: str, depth: int) -> Hits:
        from lancedb.query import MatchQuery

        if not text.strip():
            return Hits(np.zeros(0, np.int32), np.zeros(0))
        match: Any = MatchQuery  # its declared signature lacks its defaults
        query = self.table.search(match(text, "text"), query_type="fts")
        found = query.select(["doc_id"]).limit(depth).to_arrow()
        docs = self.documents.find(found["doc_id"].to_pylist())
        return ranked(docs, found["_score"].to_numpy().astype(np.float64), depth)

    def _by_vectors(self, vectors: np.ndarray, depth: int) -> list[Hits]:
        """With the settings whose recall the memory's certificate proves."""
        column = f"{self.config.against}_embedding"
        answers = vector_search(self.table, column, vectors, self.settings[column], k=depth)
        hits = []
        for answer in answers:
            docs = self.documents.find([doc_id for doc_id, _ in answer])
            hits.append(ranked(docs, np.array([score for _, score in answer], np.float64), depth))
        return hits


def check_indexes(memory: Memory, config: RetrieveConfig) -> None:
    """Refuse a table without the indexes. Rows newer than an index are not hidden: LanceDB scans them."""
    wanted = set()
    if config.retriever != "clip":
        wanted.add("text")
    if config.retriever != "bm25":
        wanted.add(f"{config.against}_embedding")
    indexes = {index.columns[0]: index for index in memory.table.list_indices()}
    for column in sorted(wanted):
        if column not in indexes:
            raise ConfigError(
                f"memory {memory.uri} has no index on {column}",
                legal="retrieve.engine = arrays needs none",
                cure="run `vimi-data build-index` again",
            )
