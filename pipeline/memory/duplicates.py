"""Duplicates in the memory: exact ones by content, near ones by embedding neighbourhoods.

RAGME (arXiv 2504.06672; its repository) joins clips whose vectors have a cosine above 0.94 into connected
components and keeps one of each. The same here; by default the perceptual hashes must agree too, for a
vector says what a picture is about, not whether it is the same picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.memory.near_duplicates import (
    COLUMN,
    EXACT_ROWS,
    DedupConfig,
    Edge,
    by_cosine,
    by_hash,
    by_index,
    calibrate,
    is_in,
)
from pipeline.memory.store import id_filter, sorted_columns
from pipeline.memory.vectors import setting_of
from pipeline.schema import Status

HASHES_PER_COSINE = 16
"""Pairs of hashes that are compared in the time of one product of 512 dimensions (2.2 ns and 34 ns)."""


SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("kept", pa.string()), ("reason", pa.string()), ("cosine", pa.float32())]
)


@dataclass(frozen=True)
class Duplicates:
    """The documents that repeat another one."""

    table: pa.Table
    """doc_id, kept (the document that stands for the group), reason (a Status), cosine."""
    min_cosine: float | None = None
    """The bound that was used."""

    @classmethod
    def none(cls) -> "Duplicates":
        return cls(SCHEMA.empty_table())

    @property
    def counts(self) -> dict[str, int]:
        reasons = self.table["reason"].to_pylist()
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def find_duplicates(
    table: Any,
    config: DedupConfig,
    *,
    new: Sequence[str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Duplicates:
    """Group the table's documents; the largest picture of a group stands for it.

    Args:
        table: LanceDB table of documents.
        config: what counts as the same.
        new: only pairs with one of these documents are looked for (a memory that grew); None = all.
        facts: of the certificate of the memory that grew: its index is used as it is.
    """
    rows = sorted_columns(table, ["doc_id", "source_sha256", "phash"])
    ids = rows["doc_id"].to_pylist()
    wanted = np.arange(len(ids)) if new is None else _places(rows["doc_id"], new)
    bound = config.min_cosine or calibrate(table, config, ids)
    pairs, few = len(ids) * len(wanted), EXACT_ROWS**2
    small = pairs <= few
    if config.max_phash_bits is not None and pairs <= HASHES_PER_COSINE * few:
        edges = by_hash(table, rows, config, wanted, bound)
    elif small or table.schema.field(COLUMN).type.list_size % 8:
        edges = by_cosine(table, ids, config, wanted, bound)
    else:
        setting = setting_of(facts, COLUMN) if facts else None
        edges = by_index(table, rows, config, wanted, bound, setting)
    near = list(edges)
    return Duplicates(_group(table, rows, wanted, near), bound)


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


def _exact_edges(places: Sequence[int], keys: list[tuple | None]) -> Iterator[Edge]:
    first: dict[tuple, int] = {}
    for place, key in zip(places, keys, strict=True):
        if key is not None and first.setdefault(key, place) != place:
            yield first[key], place, 1.0


def _group(table: Any, rows: pa.Table, wanted: np.ndarray, near: list[Edge]) -> pa.Table:
    """Near and exact edges into groups; details are read only of documents that may be in one."""
    sources = rows["source_sha256"].combine_chunks()
    asked = sources.take(pa.array(wanted)).drop_null().unique()
    maybe = np.flatnonzero(is_in(sources, asked).to_numpy(zero_copy_only=False)) if len(asked) else wanted[:0]
    counts = dict(zip(*(c.to_pylist() for c in sources.value_counts().flatten()), strict=True))
    maybe = [place for place in maybe.tolist() if counts[sources[place].as_py()] > 1]
    places = sorted({*maybe, *(place for edge in near for place in edge[:2])})
    ids = rows["doc_id"].to_pylist()
    details = _details(table, [ids[place] for place in places])
    number = {place: row for row, place in enumerate(places)}
    keys = _keys(details)
    edges = [*_exact_edges(range(len(places)), keys), *((number[a], number[b], c) for a, b, c in near)]
    return _groups(details, keys, edges)


def _details(table: Any, doc_ids: list[str]) -> pa.Table:
    """What groups are judged by, of these documents, in their order (sorted ids)."""
    columns = ["doc_id", "text", "source_sha256", "start_s", "end_s", "width_px", "height_px"]
    if len(doc_ids) * 4 > table.count_rows():
        found = sorted_columns(table, columns)
        return found.filter(is_in(found["doc_id"], pa.array(doc_ids, pa.string())))
    parts = [
        table.search().where(id_filter(doc_ids[i : i + 512])).select(columns).limit(512).to_arrow()
        for i in range(0, len(doc_ids), 512)
    ]
    empty = pa.schema([table.schema.field(name) for name in columns]).empty_table()
    return pa.concat_tables([part.select(columns) for part in parts] or [empty]).sort_by("doc_id")


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


def _places(ids: pa.ChunkedArray, some: Sequence[str]) -> np.ndarray:
    found = is_in(ids, pa.array(some, pa.string())).combine_chunks()
    return np.flatnonzero(found.to_numpy(zero_copy_only=False))
