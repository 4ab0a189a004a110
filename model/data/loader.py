"""Data loader: row groups -> batches, from any position, on any number of ranks, read ahead in threads.

    RowGroups    row groups in memory: read once for all threads, the least recently used leaves first
    Loader       micro-batches of a rank

The position is the number of samples that all ranks consumed together; nothing else is saved.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import DataError
from infra.recent import Recent
from model.condition import Prompt, References
from model.data.batch import ROW_COLUMNS, TARGET_BYTES, Batch, Sample, collate, read_prompt
from model.data.buckets import Bucket, streams_of
from model.data.plan import Plan, Source
from model.data.sample import read_sample
from model.data.shards import Shards, Stream, open_parquet
from model.encodings.store import Encodings, StoredRow

PREFETCH_BATCHES = 4
"""Micro-batches read ahead of the step. Ours."""
CACHE_BYTES = 2 << 30
"""Row groups kept in memory a rank: room for those that the order walks side by side, lanes / ranks x (window /
rows of a group + 1), or they are read more than once. Ours."""
STORED_BYTES = 256 << 20
"""Encodings kept in memory a rank: those of a small corpus, whose rows come again soon. Ours."""
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
    """Take a row group of PROMPTS apart: Python objects for the small, views for the large."""
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
        cache_bytes: int = CACHE_BYTES,
        encodings: Encodings | None = None,
    ) -> None:
        """`encodings`: of these shards; each row then carries its own as `stored`."""
        self.shards, self.buckets, self.cache_bytes = shards, buckets, cache_bytes
        self.held_out_frac, self.encodings = held_out_frac, encodings
        self.lock = threading.Lock()
        self.tables: OrderedDict[int, Future[Loaded]] = OrderedDict()
        self.stored: Recent[tuple[int, int], StoredRow] = Recent(STORED_BYTES)
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
            row["stored"] = self._stored(self.encodings, source.group, number)
        return row

    def _stored(self, encodings: Encodings, group: int, number: int) -> StoredRow:
        found = self.stored.find((group, number))
        if found is None:
            file = self._open(encodings.place(self.shards.groups[group]))
            found = encodings.read_row(file, number)
            self.stored.keep((group, number), found, file.metadata.row_group(number).total_byte_size)
        return found

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


@dataclass
class Loader:
    """This rank's micro-batches from `position` on, without end; read and decoded ahead in threads.

    Attributes:
        select: (prompt with all stored documents, global position) -> the prompt to train on.
        references: that prompt, and what is stored of its row -> its pictures that the generator sees itself,
            if it sees any.
        num_bad: targets so far that could not be read; another row of their group took their place.
    """

    plan: Plan
    row_groups: RowGroups
    select: Callable[[Prompt, int], Prompt]
    references: Callable[[Prompt, StoredRow | None], References | None] = lambda prompt, stored: None
    rank: int = 0
    world_size: int = 1
    position: int = 0
    num_threads: int = 2
    prefetch_batches: int = PREFETCH_BATCHES
    pin_memory: bool = False
    num_bad: int = 0
    pool: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.position % self.plan.micro_batch or self.plan.micro_batch < self.world_size:
            raise ValueError(f"position {self.position} or ranks {self.world_size} split a micro-batch")
        self.pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="loader")

    def __iter__(self) -> Iterator[Batch]:
        ahead: deque[Future[Batch]] = deque()
        position = self.position
        try:
            while True:
                while len(ahead) < self.prefetch_batches:
                    ahead.append(self._submit(position))
                    position += self.plan.micro_batch
                yield ahead.popleft().result()
        finally:
            self.close()

    def _submit(self, position: int) -> Future[Batch]:
        """Make a batch in one job, since each hand-over costs as much as a row, or in parts where threads would
        idle; the job that joins parts queues behind them, so never blocks all.
        """
        mine = range(position + self.rank, position + self.plan.micro_batch, self.world_size)
        count = -(-self.num_threads // self.prefetch_batches)
        if count == 1:
            return self.pool.submit(lambda: self._join([self._read_part(mine)]))
        size = -(-len(mine) // count)
        parts = [mine[first : first + size] for first in range(0, len(mine), size)]
        waiting = [self.pool.submit(self._read_part, part) for part in parts]
        return self.pool.submit(lambda: self._join([part.result() for part in waiting]))

    def _read_part(self, positions: range) -> list[Sample]:
        return [self.read(position) for position in positions]

    def _join(self, parts: list[list[Sample]]) -> Batch:
        batch = collate([sample for part in parts for sample in part])
        return batch.pin() if self.pin_memory else batch

    def read(self, position: int) -> Sample:
        """The sample at a global position.

        Raises:
            DataError: its target and those of its spares can't be read.
        """
        source = self.plan.source(position)
        bucket = self.row_groups.buckets[source.bucket]
        reason = ""
        for which in range(source.num_tries):
            row = self.row_groups.row(source, which)
            try:
                prompt = self.select(read_prompt(row), position)
                sample = read_sample(
                    row, bucket, position=position, prompt=prompt, pixels=not self.row_groups.has_latents
                )
                return replace(sample, references=self.references(prompt, row.get("stored")))
            except DataError as error:
                self.num_bad += 1
                reason = str(error)
        raise DataError(f"{source.num_tries} targets in a row can't be read; the last: {reason}")

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
