"""LanceDB's indexes for interactive search: ids, and approximate vectors that are held to a declared recall.

The join needs none of them, and what it makes doesn't depend on them. The recall is measured on the memory's
own
captions: their exact neighbours (`tile.ask_all`) against what the index answers. Below the declared floor the
build fails, and says what would have met it.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field

from infra.config import Config
from infra.errors import DataError
from pipeline.memory.retrieve import RETRIEVERS
from pipeline.memory.retrieve.hits import by_query
from pipeline.memory.search import nearest
from pipeline.memory.store import EMBEDDINGS, Memory
from pipeline.memory.tile import Tiles, ask_all
from pipeline.memory.vectors import cosines, unit, vectors_numpy

K, QUERIES = 10, 200
LADDER = ((20, 20), (60, 60), (200, 200), (1000, 500))
"""(partitions that are read, times k candidates that are scored again on the stored vectors): the first that
meets the floor is taken. Ours."""
REBUILT_FRAC = 0.1
"""A memory that grew is indexed again when more than this share of its rows lies outside its indexes; until
then LanceDB scans those rows beside them. Ours."""


class IndexConfig(Config):
    """Approximate search by vectors."""

    columns: tuple[Literal["image_embedding", "text_embedding", "document_embedding"], ...] = EMBEDDINGS
    """Embedding columns that get an index; searching another one scans it exactly."""
    min_rows: int = Field(default=20_000, ge=1)
    """Smaller memories get none: a scan takes milliseconds. Ours."""
    recall: float = Field(default=0.95, ge=0, lt=1)
    """Floor of the mean recall@10 of a sample of captions. Ours."""


def build_indexes(memory: Memory, config: IndexConfig) -> dict[str, Any]:
    """Index the table at its latest version, and measure.

    Returns:
        Facts for the certificate, by column: probes and recall.

    Raises:
        DataError: a recall below the floor.
    """
    from lancedb.index import BTree

    table = memory.table
    _create(table, "doc_id", BTree())
    if memory.num_documents < config.min_rows:
        return {}
    return {name: _vectors(memory, table, name, config) for name in config.columns}


def _create(table: Any, column: str, kind: Any) -> None:
    """Build this index, unless there is one that holds nearly all rows."""
    there = [index for index in table.list_indices() if index.columns == [column]]
    if any((i.num_unindexed_rows or 0) <= REBUILT_FRAC * table.count_rows() for i in there):
        return
    table.create_index(column, config=kind, replace=True)


def _vectors(memory: Memory, table: Any, column: str, config: IndexConfig) -> dict[str, Any]:
    from lancedb.index import IvfFlat, IvfRq

    # RaBitQ packs 8 dimensions to a byte.
    kind = IvfFlat(distance_type="cosine") if memory.dim % 8 else IvfRq(distance_type="cosine", num_bits=1)
    _create(table, column, kind)
    queries = unit(vectors_numpy(memory.sample["text_embedding"].combine_chunks())[:QUERIES])
    tiles, texts = Tiles(memory, column.removesuffix("_embedding")), [""] * len(queries)
    exact = by_query(ask_all(tiles, RETRIEVERS["clip"], texts, queries, K), len(queries))
    reached = 0.0
    for effort in LADDER:
        found = nearest(memory, table, column, queries, K, effort=effort)
        reached = _recall(memory, column, queries, exact, [hits.docs for hits in found])
        if reached >= config.recall:
            return {
                "effort": effort,
                "recall": round(reached, 4),
                "floor": config.recall,
                "queries": len(queries),
            }
    raise DataError(
        f"recall@{K} of {column}: {reached:.4f} with {LADDER[-1][0]} probes, declared {config.recall}; "
        f"cure: index.recall={max(reached - 0.01, 0):.2f}, or leave it out of index.columns (exact, slower)"
    )


def _recall(
    memory: Memory, column: str, queries: np.ndarray, exact: list[np.ndarray], found: list[np.ndarray]
) -> float:
    """Mean share of the best scores that was found; among equal scores any document is right.

    A caption that many clips share has more nearest documents than are asked for.
    """
    vectors = vectors_numpy(memory.take(np.concatenate(found).tolist(), [column])[column].combine_chunks())
    asked = np.repeat(queries, [len(docs) for docs in found], axis=0)
    scores = cosines(vectors, asked).astype(np.float32)  # as the exact search rounds them
    each = np.split(scores, np.cumsum([len(docs) for docs in found])[:-1])
    reached = [(s >= b["score"].min()).sum() / len(b) for s, b in zip(each, exact, strict=True) if len(b)]
    return float(np.mean(reached)) if reached else 1.0
