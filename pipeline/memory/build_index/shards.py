"""Staged documents -> the memory's shards: workers write fragments and arrays, the driver commits metadata.

A shard is made of the staged files of consecutive units, in their order. Lance's fragments are written beside
the table by the workers and become part of it by one commit; killed before it, the same command commits them;
killed after it, it sees that they are there.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from infra.certificate import Certificate, file_entries, write_certificate
from infra.errors import DataError, first_line
from infra.storage import delete, join, list_files, read_bytes
from pipeline.journal import Receipt, Unit
from pipeline.memory.retrieve.analysis import Analysis
from pipeline.memory.retrieve.bm25 import Postings
from pipeline.memory.store import (
    LANCE_FOLDER,
    SHARD_JOB,
    SHARDS,
    TABLE,
    Shard,
    connect,
    lance_dataset,
    lance_table,
    open_table,
    storage_options,
)
from pipeline.memory.tile import LIGHT, documents_table, write_arrays
from pipeline.schema import Status, content_id, memory_schema

STAGED, DROPPED = "staged", "dropped.bin"
SAMPLE_ROWS = 1000
"""Documents of the smallest ids that stand for all: half a million pairs. Ours."""


@dataclass(frozen=True)
class Group:
    """The staged documents of one shard."""

    number: int
    """Of the shard in the memory."""
    first: int
    """Place of its first document among the old documents and then all that are staged."""
    files: list[tuple[str, str, int]]
    """Staged file, its sha256, its rows."""

    @property
    def rows(self) -> int:
        return sum(rows for *_, rows in self.files)

    def unit(self, what: str, **more: Any) -> Unit:
        payload = {"number": self.number, "first": self.first, "files": self.files, **more}
        return Unit(content_id(what, self.number, *(sha for _, sha, _ in self.files)), payload)


def deal(receipts: Iterable[Receipt], shard_rows: int, *, shards: int, documents: int) -> list[Group]:
    """The groups that become shards: consecutive units of about `shard_rows` documents.

    Args:
        receipts: of the embedding units, in unit order.
        shard_rows: a group ends where it has so many.
        shards: that the memory has already.
        documents: that it has already.
    """
    groups: list[Group] = []
    files: list[tuple[str, str, int]] = []
    first, rows = documents, 0
    for receipt in receipts:
        if receipt["file"]:
            files.append((receipt["file"], receipt["sha256"], receipt["documents"]))
            rows += receipt["documents"]
        if rows >= shard_rows:
            groups.append(Group(shards + len(groups), first, files))
            first, files, rows = first + rows, [], 0
    if files:
        groups.append(Group(shards + len(groups), first, files))
    return groups


@dataclass(frozen=True)
class ShardWriter:
    """The worker: a group's staged files in, a shard and its receipt out."""

    out: str
    build: str
    """Folder of the build: `staged/`, and which places are dropped."""
    dim: int
    analysis: Analysis

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        name, documents, texts = f"{payload['number']:05d}", [], []
        dropped = np.frombuffer(read_bytes(join(self.build, DROPPED)), np.int64)

        def batches() -> Iterator[pa.RecordBatch]:
            first = payload["first"]
            for file, sha256, rows in payload["files"]:
                inside = dropped[np.searchsorted(dropped, first) : np.searchsorted(dropped, first + rows)]
                keep = np.ones(rows, bool)
                keep[inside - first] = False
                table = read_staged(self.build, file, sha256).filter(pa.array(keep))
                documents.append(documents_table(table.select(LIGHT)))
                texts.append(table["text"])
                first += rows
                yield from table.to_batches()

        fragments = write_fragments(self.out, batches(), self.dim)
        made = pa.concat_tables(documents)
        postings = Postings.build((text.as_py() for piece in texts for text in piece), self.analysis)
        places = write_arrays(self.out, name, documents, postings)
        data = join(self.out, LANCE_FOLDER, f"{TABLE}.lance", "data")
        places += [join(data, file["path"]) for f in fragments for file in f["files"]]
        count = sum(rows for *_, rows in payload["files"])
        filtered = {Status.FILTERED_DUPLICATE.value: count - len(made)} if count > len(made) else {}
        entries = file_entries(self.out, places)
        certificate = Certificate(
            job=SHARD_JOB,
            config_hash=self.analysis,
            num_in=count,
            num_out=len(made),
            filtered=filtered,
            files=entries,
        )
        write_certificate(join(self.out, SHARDS, name), certificate)
        ids = made["doc_id"].to_pylist()
        order = np.argsort(made["key"].to_numpy(), kind="stable")[:SAMPLE_ROWS].tolist()
        return {
            "name": name,
            "rows": len(made),
            "fragments": fragments,
            "ids_sum": f"{sum(int(doc_id, 16) for doc_id in ids):x}",
            "smallest": [(ids[row], row) for row in order],
        }


def read_staged(build: str, file: str, sha256: str) -> pa.Table:
    """A staged file, which must be the one of its receipt.

    Raises:
        DataError: it is gone, or another.
    """
    try:
        data = read_bytes(join(build, STAGED, file))
    except OSError as error:
        raise DataError(f"staged file {file} can't be read: {error}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"staged file {file} differs from its receipt: delete {build} and start again")
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def write_fragments(out: str, batches: Iterator[pa.RecordBatch], dim: int) -> list[dict[str, Any]]:
    """Write rows beside the table, as fragments that a commit will make part of it; one of any size."""
    from lance.fragment import write_fragments as write

    schema = memory_schema(dim)
    reader = pa.RecordBatchReader.from_batches(schema, batches)
    place, options = lance_table(out), storage_options(out)
    try:
        found = write(
            reader,
            place,
            schema=schema,
            mode="append",
            max_rows_per_file=2**31,
            max_bytes_per_file=2**62,  # Lance's own 90 GiB would cut a large shard in two
            storage_options=options,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"can't write documents: {first_line(error)}") from error
    return [fragment.to_json() for fragment in found]


def create_table(uri: str, dim: int) -> Any:
    """The memory's table, made empty if the folder has none."""
    table = open_table(uri)
    if table is not None:
        return table
    try:
        return connect(uri).create_table(TABLE, schema=memory_schema(dim))
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"can't make a table at {uri}: {first_line(error)}") from error


def commit(out: str, receipts: Sequence[Receipt], *, first: int, version: str) -> list[Shard]:
    """Make the written fragments part of the table, in order, by one commit of metadata.

    Args:
        out: the memory.
        receipts: of the shards, in order.
        first: number of their first document.
        version: tag of the version that they belong to.

    Returns:
        The new shards.
    """
    import lance
    from lance.fragment import FragmentMetadata

    dataset = lance_dataset(out)
    there = _fragments(dataset)
    fresh = [f for receipt in receipts for f in receipt["fragments"] if f["files"][0]["path"] not in there]
    if fresh:
        operation = lance.LanceOperation.Append([FragmentMetadata.from_json(json.dumps(f)) for f in fresh])
        options = storage_options(out)
        try:
            dataset = lance.LanceDataset.commit(
                lance_table(out), operation, read_version=dataset.version, storage_options=options
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"can't commit to {out}: {first_line(error)}") from error
        there = _fragments(dataset)
    data = join(out, LANCE_FOLDER, f"{TABLE}.lance", "data")
    for place in list_files(data, recursive=False):
        if place.rpartition("/")[2] not in there:
            delete(place)  # of a worker that was killed while it wrote
    shards = []
    for receipt in receipts:
        fragment = there[receipt["fragments"][0]["files"][0]["path"]]
        shards.append(Shard(receipt["name"], first, receipt["rows"], fragment, version))
        first += receipt["rows"]
    return shards


def _fragments(dataset: Any) -> dict[str, int]:
    """File of a fragment -> its number."""
    return {fragment.metadata.files[0].path: fragment.fragment_id for fragment in dataset.get_fragments()}
