"""Indexes of the memory: BM25 over the text, the ids, and the kinds of vector index that may be tried."""

from typing import Any

from pipeline.memory.config import IndexConfig
from pipeline.memory.vectors import Setting


def build_text_index(table: Any) -> None:
    """BM25 over the documents' text: LanceDB's native full-text index (simple words, English stems)."""
    from lancedb.index import FTS

    drop_index(table, "text")
    table.create_index("text", config=FTS())


def build_id_index(table: Any) -> None:
    """An index of the ids: upserts and look-ups without a scan, and new columns without rewriting old ones."""
    from lancedb.index import BTree

    drop_index(table, "doc_id")
    table.create_index("doc_id", config=BTree())


def make_index(table: Any, column: str, setting: Setting) -> None:
    """Build the index of this kind, in place of the one that is there."""
    from lancedb import index

    rows = table.count_rows()
    drop_index(table, column)
    config = {
        "flat": lambda: index.IvfFlat(distance_type="cosine", num_partitions=max(1, rows // 8192)),
        "rq": lambda: index.IvfRq(distance_type="cosine", num_bits=setting.num_bits),
        "pq": lambda: index.IvfPq(distance_type="cosine", num_bits=8),
        "hnsw": lambda: index.HnswSq(distance_type="cosine"),
    }[setting.kind]()
    table.create_index(column, config=config)


def drop_index(table: Any, column: str) -> None:
    for found in table.list_indices():
        if found.columns == [column]:
            table.drop_index(found.name)


def index_bytes(table: Any, column: str) -> int:
    return sum(i.size_bytes or 0 for i in table.list_indices() if i.columns == [column])


def kinds(config: IndexConfig, rows: int, dim: int, budget: int) -> list[Setting]:
    """Indexes to try, cheapest first, that fit the budget."""
    if config.kind == "flat" or (config.kind == "auto" and rows <= config.exact_rows):
        return [Setting("flat")]
    tries = {
        "rq": [Setting("rq", num_bits=1), Setting("rq", num_bits=4)],
        "hnsw": [Setting("hnsw")],
        "pq": [Setting("pq", num_bits=8)],
    }
    chosen = tries["rq"] + tries["hnsw"] if config.kind == "auto" else tries[config.kind]
    if dim % 8:
        chosen = [s for s in chosen if s.kind != "rq"]  # RaBitQ packs 8 dimensions to a byte
    return [s for s in chosen if s.bytes_of(rows, dim) <= budget]


def ladder(base: Setting) -> list[Setting]:
    """Search settings of one index, cheapest first."""
    dials = {
        "flat": [(0, 0, 0)],
        "rq": [(n, r, 0) for r in (2, 5, 10, 20, 50, 100) for n in (16, 64, 256)],
        "pq": [(n, r, 0) for r in (5, 10, 20, 50, 100) for n in (16, 64, 256)],
        "hnsw": [(16, r, e) for r in (2, 10, 30) for e in (64, 200, 500)],
    }[base.kind]
    return [Setting(base.kind, base.num_bits, n, r, e) for n, r, e in dials]
