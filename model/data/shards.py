"""Opens certified prompt shards for training: their row groups, and the rows of each bucket and task.

open_shards(uri)   its row groups, from the sidecar meta.parquet: no shard is opened but the first
index_shards(...)  rows of each stream (bucket x task) in each row group: four small columns, read once
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.certificate import Certificate, check_certified, read_certificate
from infra.errors import ConfigError, DataError
from infra.storage import absolute, exists, filesystem, is_remote, join
from model.data.batch import check_schema
from model.data.buckets import KEY_COLUMNS, Bucket, streams_of


@dataclass(frozen=True, slots=True)
class RowGroup:
    uri: str
    index: int
    num_rows: int


@dataclass(frozen=True)
class Shards:
    """A certified folder of prompts."""

    uri: str
    certificate: Certificate
    groups: tuple[RowGroup, ...]

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups)


JOBS = ("augment", "instruct", "benchmark")


def open_shards(uri: str) -> Shards:
    """Open a folder that `vimi-data augment` or `instruct` made.

    Raises:
        ConfigError: not certified, of another job or schema, or empty.
    """
    made_by = "`vimi-data augment` (or `instruct`)"
    try:
        certificate = read_certificate(uri)
    except DataError as error:
        raise ConfigError(str(error), cure=f"give the output of {made_by}") from None
    if certificate is None or certificate.job not in JOBS:
        got = f"no certified prompts at {uri}" if certificate is None else f"{uri} holds {certificate.job}"
        raise ConfigError(got, legal="a folder of prompt shards", cure=f"run {made_by} first")
    meta = join(absolute(uri), "meta.parquet")
    if not exists(meta):
        raise ConfigError(f"{uri} has no meta.parquet", cure=f"run {made_by} again")
    table = open_parquet(meta).read(columns=["file", "row_group", "num_rows"])
    files, indices, rows = (column.to_pylist() for column in table.columns)
    places = {file: join(absolute(uri), file) for file in set(files)}
    groups = tuple(
        RowGroup(places[file], index, count)
        for file, index, count in zip(files, indices, rows, strict=True)
        if count
    )
    if not groups:
        raise ConfigError(f"{uri} holds no prompts", cure="look at its rejected.parquet for the reasons")
    check_schema(open_parquet(groups[0].uri).schema_arrow, groups[0].uri)
    return Shards(absolute(uri), certificate, groups)


def open_parquet(uri: str) -> pq.ParquetFile:
    """The file's footer, read; a local file is mapped, which spares a copy of its pages.

    Raises:
        DataError: it is not the file that the certificate beside it lists.
    """
    check_certified(uri)
    fs, path = filesystem(uri)
    return pq.ParquetFile(fs.open_input_file(path) if is_remote(uri) else pa.memory_map(path))


Stream = tuple[int, str]
"""(number of the bucket, task)."""


def index_shards(shards: Shards, buckets: tuple[Bucket, ...], *, held_out_frac: float = 0.0) -> pa.Table:
    """Rows of each stream in each row group: columns group, bucket, task, rows. Reads KEY_COLUMNS only."""

    def count(number: int) -> list[dict[str, Any]]:
        group = shards.groups[number]
        keys = open_parquet(group.uri).read_row_group(group.index, columns=KEY_COLUMNS)
        found = [stream for stream in streams_of(keys, buckets, held_out_frac) if stream is not None]
        return [
            {"group": number, "bucket": bucket, "task": task, "rows": found.count((bucket, task))}
            for bucket, task in sorted(set(found))
        ]

    with ThreadPoolExecutor(8) as pool:  # most of the time waits for the file system
        rows = [row for part in pool.map(count, range(len(shards.groups))) for row in part]
    columns = [("group", pa.int64()), ("bucket", pa.int32()), ("task", pa.string()), ("rows", pa.int64())]
    return pa.Table.from_pylist(rows, schema=pa.schema(columns))
