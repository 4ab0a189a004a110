"""Duplicates in the memory: exact ones by content, near ones by embedding neighbourhoods.

RAGME (arXiv 2504.06672; its repository) joins clips whose vectors have a cosine above 0.94 into connected
components and keeps one of each. The same here, with the edges from an exact search for small tables and
from the verified vector index for large ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from infra.config import Config
from pipeline.memory.index import make_index
from pipeline.memory.recall import unit
from pipeline.memory.store import id_filter, sorted_columns, stream_vectors
from pipeline.memory.vectors import Setting, vector_search
from pipeline.schema import Status

Edge = tuple[int, int, float]


class DedupConfig(Config):
    """What counts as the same document, and what becomes of it."""

    mode: Literal["off", "report", "drop"] = "report"
    """report = list them in `duplicates.parquet`; drop = leave all but one of each group out, counted as
    filtered_duplicate or filtered_near_duplicate."""
    min_cosine: float = Field(default=0.94, gt=0, le=1)
    """Pictures closer than this are near-duplicates. RAGME: 0.94, for CLIP ViT vectors of clips."""
    max_phash_bits: int | None = Field(default=None, ge=0, le=64)
    """If set, the perceptual hashes must also differ in at most this many bits: stricter, for weak
    encoders that put different pictures of one kind close together."""
    column: Literal["image_embedding", "document_embedding"] = "image_embedding"
    """Vectors that are compared; with document_embedding the texts must be alike too."""
    neighbours: int = Field(default=32, ge=1)
    """Nearest documents that are looked at of each, in tables beyond `exact_rows`. Ours."""
    exact_rows: int = Field(default=50_000, ge=0)
    """Tables up to this size are compared pair by pair (about a minute at this size). Ours."""


@dataclass(frozen=True)
class Duplicates:
    """The documents that repeat another one."""

    table: pa.Table
    """doc_id, kept (the document that stands for the group), reason (a Status), cosine."""

    @classmethod
    def none(cls) -> "Duplicates":
        return cls(SCHEMA.empty_table())

    @property
    def counts(self) -> dict[str, int]:
        reasons = self.table["reason"].to_pylist()
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("kept", pa.string()), ("reason", pa.string()), ("cosine", pa.float32())]
)


SEARCH = Setting("rq", num_bits=1, nprobes=64, refine=20)
"""Recall@10 of 1.000 on 100,000 clustered vectors (measured): enough to find neighbours above 0.9."""


def find_duplicates(table: Any, config: DedupConfig, *, new: Sequence[str] | None = None) -> Duplicates:
    """Group the table's documents; the largest picture of a group stands for it.

    Args:
        table: LanceDB table of documents.
        config: what counts as the same.
        new: only pairs with one of these documents are looked for (a memory that grew); None = all.
    """
    columns = ["doc_id", "text", "source_sha256", "start_s", "end_s", "phash", "width_px", "height_px"]
    rows = sorted_columns(table, columns)
    ids = rows["doc_id"].to_pylist()
    wanted = range(len(ids)) if new is None else _places(ids, new)
    near = _near_edges(table, ids, config, wanted)
    if config.max_phash_bits is not None:
        hashes = rows["phash"].to_pylist()
        near = (edge for edge in near if _alike(hashes, edge, config.max_phash_bits))
    keys = _keys(rows)
    return Duplicates(_groups(rows, keys, [*_exact_edges(keys), *near]))


def drop(table: Any, duplicates: Duplicates) -> None:
    """Delete the duplicates from the table; done twice, it changes nothing more."""
    doc_ids = duplicates.table["doc_id"].to_pylist()
    for start in range(0, len(doc_ids), 512):
        table.delete(id_filter(doc_ids[start : start + 512]))


def _keys(rows: pa.Table) -> list[tuple | None]:
    """What two exact duplicates share: the piece of the parent, and the words (case and spaces aside)."""
    columns = (rows[name].to_pylist() for name in ("source_sha256", "start_s", "end_s", "text"))
    return [
        (parent, start, end, " ".join((text or "").lower().split())) if parent else None
        for parent, start, end, text in zip(*columns, strict=True)
    ]


def _exact_edges(keys: list[tuple | None]) -> Iterator[Edge]:
    first: dict[tuple, int] = {}
    for place, key in enumerate(keys):
        if key is not None and first.setdefault(key, place) != place:
            yield first[key], place, 1.0


def _near_edges(table: Any, ids: list[str], config: DedupConfig, wanted: Sequence[int]) -> Iterator[Edge]:
    dim = table.schema.field(config.column).type.list_size
    if len(ids) * len(wanted) <= config.exact_rows**2 or dim % 8:
        yield from _near_exact(table, ids, config, wanted)
        return
    make_index(table, config.column, SEARCH)
    place = {doc_id: number for number, doc_id in enumerate(ids)}
    chosen = {ids[number] for number in wanted}
    for block_ids, block in stream_vectors(table, config.column, batch_rows=1024):
        mask = np.array([doc_id in chosen for doc_id in block_ids.to_pylist()], bool)
        if not mask.any():
            continue
        some = [doc_id for doc_id, take in zip(block_ids.to_pylist(), mask, strict=True) if take]
        answers = vector_search(table, config.column, unit(block[mask]), SEARCH, k=config.neighbours)
        for doc_id, answer in zip(some, answers, strict=True):
            for other, cosine in answer:
                if other != doc_id and cosine >= config.min_cosine:
                    yield place[doc_id], place[other], cosine


def _near_exact(table: Any, ids: list[str], config: DedupConfig, wanted: Sequence[int]) -> Iterator[Edge]:
    """All pairs, block by block: `n^2 d` products."""
    place = {doc_id: number for number, doc_id in enumerate(ids)}
    dim = table.schema.field(config.column).type.list_size
    vectors = np.zeros((len(ids), dim), np.float32)
    for block_ids, block in stream_vectors(table, config.column):
        vectors[[place[doc_id] for doc_id in block_ids.to_pylist()]] = unit(block)
    chosen = np.fromiter(wanted, np.int64)
    for start in range(0, len(chosen), 1024):
        part = chosen[start : start + 1024]
        cosines = vectors[part] @ vectors.T
        for row, column in zip(*np.nonzero(cosines >= config.min_cosine), strict=True):
            if part[row] != column:
                yield int(part[row]), int(column), float(cosines[row, column])


def _alike(hashes: list[int | None], edge: Edge, max_bits: int) -> bool:
    one, other = hashes[edge[0]], hashes[edge[1]]
    return one is not None and other is not None and (one ^ other).bit_count() <= max_bits


def _groups(rows: pa.Table, keys: list[tuple | None], edges: list[Edge]) -> pa.Table:
    """Connected components; of each, every document but the one that stays, with the reason."""
    parent = list(range(len(rows)))
    closest: dict[int, float] = {}
    for one, other, cosine in edges:
        a, b = _root(parent, one), _root(parent, other)
        parent[max(a, b)] = min(a, b)
        for place in (one, other):
            closest[place] = min(1.0, max(closest.get(place, -1.0), cosine))
    groups: dict[int, list[int]] = {}
    for place in closest:
        groups.setdefault(_root(parent, place), []).append(place)
    ids, widths, heights = (rows[c].to_pylist() for c in ("doc_id", "width_px", "height_px"))
    found = []
    for group in groups.values():
        kept = min(group, key=lambda p: (-(widths[p] or 0) * (heights[p] or 0), ids[p]))
        for place in (p for p in group if p != kept):
            same = keys[place] is not None and keys[place] == keys[kept]
            reason = Status.FILTERED_DUPLICATE if same else Status.FILTERED_NEAR_DUPLICATE
            found.append((ids[place], ids[kept], reason.value, closest[place]))
    columns = list(zip(*sorted(found), strict=True)) or [()] * len(SCHEMA)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _root(parent: list[int], place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place


def _places(ids: list[str], some: Sequence[str]) -> list[int]:
    wanted = set(some)
    return [place for place, doc_id in enumerate(ids) if doc_id in wanted]
