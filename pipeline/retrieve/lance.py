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
from pipeline.retrieve.bm25 import Hits, ranked
from pipeline.retrieve.documents import Documents
from pipeline.retrieve.fuse import reciprocal_rank
from pipeline.retrieve.join import RetrieveConfig

THREADS = 4
VECTORS_AT_ONCE = 64


class LanceSearch:
    """Approximate vectors, exact BM25, by the table's indexes.

    Raises:
        ConfigError: the table has no full-text index, or rows that its indexes don't cover.
    """

    def __init__(self, config: RetrieveConfig, documents: Documents, memory: Memory) -> None:
        self.config, self.documents, self.table = config, documents, memory.table
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
        column = f"{self.config.against}_embedding"
        hits: list[Hits] = []
        for start in range(0, len(vectors), VECTORS_AT_ONCE):
            piece = list(vectors[start : start + VECTORS_AT_ONCE])
            query = self.table.search(piece, vector_column_name=column, query_type="vector")
            query = query.distance_type("dot").refine_factor(10)
            found = query.select(["doc_id", "_distance"]).limit(depth).to_arrow()
            numbers = found["query_index"].to_numpy() if len(piece) > 1 else np.zeros(len(found))
            docs = self.documents.find(found["doc_id"].to_pylist())
            scores = 1.0 - found["_distance"].to_numpy().astype(np.float64)
            hits += [ranked(docs[numbers == n], scores[numbers == n], depth) for n in range(len(piece))]
        return hits


def check_indexes(memory: Memory, config: RetrieveConfig) -> None:
    """Refuse indexes that are missing or older than the table: they would hide documents."""
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
        stats = memory.table.index_stats(indexes[column].name)
        if stats is not None and stats.num_unindexed_rows:
            raise ConfigError(
                f"memory {memory.uri}: the index on {column} is older than the table "
                f"({stats.num_unindexed_rows} documents are not in it)",
                legal="retrieve.engine = arrays needs none",
                cure="run `vimi-data build-index` again",
            )
