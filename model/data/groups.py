"""Row groups of the shards in memory: read once for all threads, the least recently used leaves first."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.data.batch import ROW_COLUMNS, TARGET_BYTES
from model.data.buckets import Bucket, streams_of
from model.data.plan import Source
from model.data.shards import Shards, Stream, open_parquet
from model.encodings.store import Encodings

OPEN_FILES = 128
"""Parquet files that a thread keeps open, with their footers. Ours."""


@dataclass(frozen=True)
class Loaded:
    """A row group in memory: its rows without their targets' bytes, views of those, and which rows belong to
    each stream.
    """

    rows: list[dict[str, Any]]
    data: Sequence[np.ndarray | None]
    numbers: dict[Stream, list[int]]
    num_bytes: int

    def row(self, number: int) -> dict[str, Any]:
        """A row of PROMPTS, its target's bytes uncopied."""
        row = self.rows[number]
        return {**row, "target": {**row["target"], "data": self.data[number]}}


def load_rows(table: pa.Table, numbers: dict[Stream, list[int]]) -> Loaded:
    """Take a row group of PROMPTS apart: Python objects for the small, views for the large.

    Args:
        table: of ROW_COLUMNS and TARGET_BYTES.
        numbers: which rows belong to each stream.
    """
    place = table.schema.get_field_index("target")
    chunks = table["target"].chunks
    target = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)  # which copies
    names = [f.name for f in target.type if f.name != "data"]
    small = pa.StructArray.from_arrays([target.field(name) for name in names], names=names)
    rows = table.set_column(place, "target", small).to_pylist()
    return Loaded(rows, binary_views(target.field("data")), numbers, table.nbytes)


def binary_views(data: pa.Array) -> list[np.ndarray | None]:
    """Each value of a binary array as a slice of the array's own buffer (a scalar of Arrow's is a copy)."""
    _, offsets, values = data.buffers()
    ends = np.frombuffer(offsets, dtype=np.int32)[data.offset : data.offset + len(data) + 1].tolist()
    valid = data.is_valid().to_pylist()
    whole = np.frombuffer(values or b"", np.uint8)
    spans = zip(ends[:-1], ends[1:], valid, strict=True)
    return [whole[start:end] if there else None for start, end, there in spans]


class RowGroups:
    """Row groups in memory: read once for all threads, the least recently used one leaves first."""

    def __init__(
        self,
        shards: Shards,
        buckets: tuple[Bucket, ...],
        *,
        held_out_frac: float = 0.0,
        cache_bytes: int = 1 << 30,
        encodings: Encodings | None = None,
    ) -> None:
        """`encodings`: of these shards; each row then carries its own as `stored`."""
        self.shards, self.buckets, self.cache_bytes = shards, buckets, cache_bytes
        self.held_out_frac, self.encodings = held_out_frac, encodings
        self.lock = threading.Lock()
        self.tables: OrderedDict[int, Future[Loaded]] = OrderedDict()
        self.files = threading.local()
        self.num_bytes = 0

    @property
    def has_latents(self) -> bool:
        """Whether targets need not be decoded."""
        return self.encodings is not None and self.encodings.facts.autoencoder_content is not None

    def row(self, source: Source, which: int) -> dict[str, Any]:
        """The `which`-th choice of the source, as a row of PROMPTS."""
        loaded = self._table(source.group)
        number = loaded.numbers[source.stream][source.try_row(which)]
        row = loaded.row(number)
        if self.encodings is not None:
            stored = self._open(self.encodings.place(self.shards.groups[source.group]))
            row["stored"] = self.encodings.read_row(stored, number)
        return row

    def _table(self, group: int) -> Loaded:
        with self.lock:
            future = self.tables.get(group)
            mine = future is None
            if future is None:
                future = self.tables[group] = Future()
            self.tables.move_to_end(group)
        if mine:
            self._read(group, future)
        return future.result()

    def _read(self, group: int, future: Future[Loaded]) -> None:
        try:
            place = self.shards.groups[group]
            # Arrow's own threads would fetch and free each group's memory anew: five times the time.
            table = self._open(place.uri).read_row_group(
                place.index, columns=[*ROW_COLUMNS, TARGET_BYTES], use_threads=False
            )
        except Exception as error:  # noqa: BLE001 - handed to every thread that waits for this group
            with self.lock:
                self.tables.pop(group, None)
            future.set_exception(error)
            return
        numbers: dict[Stream, list[int]] = {}
        for number, stream in enumerate(streams_of(table, self.buckets, self.held_out_frac)):
            if stream is not None:
                numbers.setdefault(stream, []).append(number)
        future.set_result(load_rows(table, numbers))
        with self.lock:
            self.num_bytes += table.nbytes
            self._evict(keep=group)

    def _evict(self, keep: int) -> None:
        for group in list(self.tables):
            if self.num_bytes <= self.cache_bytes:
                return
            future = self.tables[group]
            if group != keep and future.done():
                self.num_bytes -= future.result().num_bytes
                del self.tables[group]

    def _open(self, uri: str) -> pq.ParquetFile:
        """This thread's handle; footers are parsed once a file and thread."""
        handles: OrderedDict[str, pq.ParquetFile] | None = getattr(self.files, "handles", None)
        if handles is None:
            handles = self.files.handles = OrderedDict()
        if uri not in handles:
            handles[uri] = open_parquet(uri)
            if len(handles) > OPEN_FILES:
                handles.popitem(last=False)
        handles.move_to_end(uri)
        return handles[uri]
