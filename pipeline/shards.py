"""Parquet shards that a trainer can stream: the same rows give the same bytes, any row group in O(1).

    part-00000.parquet ...   rows of `schema.PROMPTS`, in row groups sized for the trainer
    meta.parquet             one line per row group: which file, which group, where its rows begin
    certificate.json         written last; lists every file with its hash

The trainer's unit of reading (and of shuffling) is the row group. `meta.parquet` is what makes a
resume cheap: sample n of ten million is found by one binary search, without opening a shard.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.certificate import Certificate, FileEntry, check_certified, check_files, input_certificate
from infra.errors import ConfigError, DataError
from infra.storage import absolute, filesystem, join, write_bytes
from pipeline.schema import REJECTED, Status

PREFIX = "part-"
META_FILE, REJECTED_FILE, PAIRS_FILE = "meta.parquet", "rejected.parquet", "pairs.parquet"
PLACES_FILE = "places.parquet"
SHARD_JOBS = ("augment", "instruct", "benchmark")

META = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("num_rows", pa.int32(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
    ],
    metadata={"table": "meta"},
)


def shard_name(number: int) -> str:
    return f"{PREFIX}{number:05d}.parquet"


def is_shard(uri: str) -> bool:
    """Is this path or URI one of the files that `shard_name` names?"""
    return uri.rpartition("/")[2].startswith(PREFIX)


def shards_of(uri: str, certificate: Certificate) -> list[str]:
    """Places of the shards that a folder's certificate lists, in order."""
    return [join(uri, entry.path) for entry in certificate.files if is_shard(entry.path)]


def shard_bytes(rows: pa.Table | Iterable[dict[str, Any]], schema: pa.Schema, *, row_group_rows: int) -> bytes:
    """Encode rows as Parquet: every writer option that changes bytes is fixed here.

    Of rows as dictionaries one row group is in memory at a time; a table's chunks and metadata don't reach the
    bytes.
    """
    leaves = _leaf_paths(schema)
    # Pictures and frames are stored as they are: JPEG doesn't shrink, and the trainer reads faster.
    raw = {path for path in leaves if path.split(".")[-1] in ("image", "data")}
    plain = [field.name for field in schema if not pa.types.is_nested(field.type)]
    options: dict[str, Any] = {
        "version": "2.6",
        "compression": {path: "NONE" if path in raw else "ZSTD" for path in leaves},
        "use_dictionary": [path for path in leaves if path not in raw],
        "write_statistics": plain,
        "data_page_version": "1.0",
        "store_schema": True,
    }
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for group in _row_groups(rows, schema, row_group_rows):
            writer.write_table(
                group.select(schema.names).cast(schema).combine_chunks(), row_group_size=row_group_rows
            )
    return sink.getvalue().to_pybytes()


def _row_groups(rows: Any, schema: pa.Schema, row_group_rows: int) -> Iterator[pa.Table]:
    if isinstance(rows, pa.Table):
        yield rows
        return
    rest = iter(rows)
    for first in rest:
        yield pa.Table.from_pylist([first, *islice(rest, row_group_rows - 1)], schema=schema)


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """Parquet's dotted name of each leaf column, e.g. `segments.list.element.image`."""

    def below(kind: pa.DataType, path: str) -> Iterator[str]:
        if isinstance(kind, pa.ListType):
            yield from below(kind.value_type, f"{path}.list.element")
        elif isinstance(kind, pa.StructType):
            for number in range(kind.num_fields):
                yield from below(kind.field(number).type, f"{path}.{kind.field(number).name}")
        else:
            yield path

    return [leaf for field in schema for leaf in below(field.type, field.name)]


def write_shard(
    uri: str,
    rows: pa.Table | Iterable[dict[str, Any]],
    schema: pa.Schema,
    *,
    row_group_rows: int = 64,
) -> FileEntry:
    """Write one Parquet file, whole or not at all; the same rows give the same bytes.

    Returns:
        Its entry for the certificate; `path` is the last part of `uri`.
    """
    data = shard_bytes(rows, schema, row_group_rows=row_group_rows)
    write_bytes(uri, data)
    return FileEntry(
        path=uri.rpartition("/")[2],
        rows=pq.read_metadata(pa.BufferReader(data)).num_rows,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def write_rejected(out: str, rows: Iterable[dict[str, Any]]) -> FileEntry:
    """Write the table of rows that were left out or failed, each with its status and reason."""
    return write_shard(join(out, REJECTED_FILE), rows, REJECTED, row_group_rows=1 << 16)


def rejected_row(row: dict[str, Any], status: Status, error: str | None) -> dict[str, Any]:
    """What became of a clip that gives no row of output, as a row of `schema.REJECTED`."""
    values = {"row_id": row["clip_id"], "source_uri": row["source_uri"]}
    return {**values, "status": status.value, "error": error}


def group_sizes(num_rows: int, row_group_rows: int) -> list[int]:
    """Rows of each row group that `write_shard` makes of `num_rows` rows."""
    full, rest = divmod(num_rows, row_group_rows)
    return [row_group_rows] * full + [rest] * (rest > 0)


def write_meta(out: str, files: Iterable[FileEntry], *, row_group_rows: int) -> FileEntry:
    """Write `meta.parquet` for shards made with `row_group_rows`, in the order of `files`.

    Needs no look into the shards: their row groups follow from their row counts. `num_bytes` is
    the file's size shared out by rows, good enough to plan reads.
    """
    columns: dict[str, list[Any]] = {name: [] for name in META.names}
    first_row = 0
    for file in files:
        for number, size in enumerate(group_sizes(file.rows, row_group_rows)):
            share = file.num_bytes * size // max(file.rows, 1)
            for name, value in zip(META.names, (file.path, number, size, first_row, share), strict=True):
                columns[name].append(value)
            first_row += size
    return write_shard(join(out, META_FILE), pa.table(columns, META), META, row_group_rows=1 << 20)


def open_part(uri: str) -> pq.ParquetFile:
    """A file of a certified table: the one reader of clips tables, prompts and what lies beside them.

    Raises:
        DataError: it is missing, damaged, or not the file that its folder's certificate lists.
    """
    check_certified(uri)
    return _parquet(uri)


def read_slice(uri: str, start: int, rows: int, columns: Sequence[str]) -> pa.Table:
    """Rows [start, start + rows) of a Parquet file; reads only the row groups that hold them."""
    with open_part(uri) as file:
        groups, first, offset = [], None, 0
        for index in range(file.num_row_groups):
            size = file.metadata.row_group(index).num_rows
            if offset < start + rows and offset + size > start:
                first = offset if first is None else first
                groups.append(index)
            offset += size
        table = file.read_row_groups(groups, columns=list(columns), use_threads=False)
    return table.slice(start - (first or 0), rows)


def _parquet(uri: str) -> pq.ParquetFile:
    fs, path = filesystem(uri)
    try:
        return pq.ParquetFile(fs.open_input_file(path), pre_buffer=True)
    except (OSError, pa.ArrowException) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{uri} can't be read: {first}; cure: restore it, or make it again") from None


@dataclass(frozen=True)
class RowGroup:
    """One unit of reading: rows [first_row, first_row + num_rows) of the whole set."""

    file: str
    row_group: int
    num_rows: int
    first_row: int
    num_bytes: int


class ShardSet:
    """A certified folder of prompt shards, read by row group.

    Args:
        uri: the output folder of `augment` or `instruct`.

    Raises:
        ConfigError: nothing certified there, or the output of another job.
        DataError: a file is not the one that was certified: `meta.parquet` now, a shard when it is first read.
    """

    def __init__(self, uri: str) -> None:
        self.uri = absolute(uri)
        self.certificate = shard_certificate(self.uri)
        with self._open_file(META_FILE) as file:
            self._meta = file.read()
        self._first_rows = self._meta["first_row"].to_numpy()
        self.num_rows: int = sum(self._meta["num_rows"].to_pylist())
        self._open = lru_cache(maxsize=32)(self._open_file)

    @cached_property
    def files(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.certificate.files}

    def __len__(self) -> int:
        return self._meta.num_rows

    @cached_property
    def row_groups(self) -> list[RowGroup]:
        return [RowGroup(**row) for row in self._meta.to_pylist()]

    def find(self, row: int) -> tuple[int, int]:
        """Row number in the whole set -> (row group, place in it)."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        group = bisect_right(self._first_rows, row) - 1
        return group, row - int(self._first_rows[group])

    def read_row_group(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of row group `number` (numbered over the whole set) as a table."""
        place = {name: self._meta[name][number].as_py() for name in ("file", "row_group")}
        return self._open(place["file"]).read_row_group(place["row_group"], columns=columns)

    def _open_file(self, name: str) -> pq.ParquetFile:
        if name not in self.files:
            raise DataError(f"{self.uri}/{name} is not in its certificate; cure: make that folder again")
        check_files(self.uri, [self.files[name]])
        return _parquet(join(self.uri, name))

    def __getstate__(self) -> str:
        return self.uri  # open files don't travel to other processes

    def __setstate__(self, uri: str) -> None:
        self.__init__(uri)


def shard_certificate(uri: str) -> Certificate:
    """The certificate of a folder of prompt shards.

    Raises:
        ConfigError: nothing certified there, or the output of another job.
    """
    certificate = input_certificate(uri)
    if certificate is None:
        raise ConfigError(
            f"no certified shards at {uri}",
            legal="the output folder of `vimi-data augment` or `vimi-data instruct`",
            cure="run that command first, or again if it was stopped",
        )
    if certificate.job not in SHARD_JOBS:
        raise ConfigError(
            f"{uri} was made by {certificate.job!r}",
            legal="the output folder of `vimi-data augment` or `vimi-data instruct`",
        )
    return certificate
