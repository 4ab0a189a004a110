"""What a retriever is: ranked lists of one shard, and how the lists of all shards become one."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline.memory.retrieve.hits import Hits


class Searched(Protocol):
    """What can be asked: one shard of a memory (a tile), or all of it."""

    def by_words(self, texts: Sequence[str], depth: int) -> list[Hits]: ...

    def by_vectors(self, vectors: np.ndarray, depth: int) -> list[Hits]: ...

    def take(self, docs: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Columns of the memory's table for documents that were found."""
        ...


class Retriever(Protocol):
    """A way to rank the documents of a batch of queries; a new one is a subclass and an entry of
    `RETRIEVERS`.
    """

    needs_words: bool = False
    """The query's words are compared: a picture alone can't be one."""
    needs_vectors: bool = False
    """The query's CLIP vector is compared."""

    def search(self, tile: Searched, texts: Sequence[str], vectors: np.ndarray, depth: int) -> list[list[Hits]]:
        """The `depth` best of a shard: one list for each kind of score, in it the hits of each query.

        Args:
            tile: a shard.
            texts: `q` queries.
            vectors: their CLIP vectors, float32 `q d`, or `q 0` where none are needed.
            depth: documents wanted of each list.

        A reranker finds by one of these scores and says in `Hits.second` what it thinks of each: so the shards
        don't decide which documents it looks at.
        """
        ...

    def fuse(self, rows: np.ndarray, depth: int) -> np.ndarray:
        """One list of one query's merged lists (`HIT`, ordered by kind and rank), best first."""
        return rows
