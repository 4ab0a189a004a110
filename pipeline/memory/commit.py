"""Commits staged files to LanceDB, in unit order, each group atomically.

Killed between a commit and its ledger entry, the same command commits that group again: the ids are
content hashes and the upsert leaves rows that are there, so nothing is doubled and nothing is lost.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from infra.certificate import read_sealed, write_sealed
from infra.errors import DataError, first_line
from infra.storage import exists, join, read_bytes
from pipeline.journal import Receipt
from pipeline.memory.store import TABLE, connect, open_table, upsert, vectors_numpy
from pipeline.schema import memory_schema

STAGED, LEDGER = "staged", "committed.json"
GROUP_ROWS = 50_000
"""Rows of a commit, about 1 GB of documents; fewer, larger commits make fewer fragments."""


def create_table(uri: str, dim: int) -> Any:
    """The memory's table, made empty if the folder has none."""
    table = open_table(uri)
    if table is not None:
        return table
    try:
        return connect(uri).create_table(TABLE, schema=memory_schema(dim))
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"can't make a table at {uri}: {first_line(error)}") from error


def commit_staged(
    table: Any, folder: str, receipts: Iterable[Receipt], *, group_rows: int = GROUP_ROWS
) -> None:
    """Add the documents of all receipts, in order.

    Args:
        table: LanceDB table, at its latest version.
        folder: the build's folder: `staged/` files and the ledger of committed groups.
        receipts: of the embedding units, in unit order.
        group_rows: rows of one commit, about.

    Raises:
        DataError: a staged file that doesn't match its receipt, or a write that fails.
    """
    ledger = join(folder, LEDGER)
    done = int(read_sealed(ledger)["units"]) if exists(ledger) else 0
    for last, files in _groups(receipts, group_rows):
        if last <= done:
            continue
        if files:
            upsert(table, first_of_each(_read(folder, files)))
        write_sealed(ledger, {"units": last})


def _groups(receipts: Iterable[Receipt], group_rows: int) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """(number of units up to here, [(file, sha256)]) in groups of about `group_rows` documents."""
    files: list[tuple[str, str]] = []
    rows = count = 0
    for count, receipt in enumerate(receipts, start=1):
        if receipt["file"]:
            files.append((receipt["file"], receipt["sha256"]))
            rows += receipt["documents"]
        if rows >= group_rows:
            yield count, files
            files, rows = [], 0
    if count:
        yield count, files


def _read(folder: str, files: list[tuple[str, str]]) -> pa.Table:
    tables = []
    for name, sha256 in files:
        try:
            data = read_bytes(join(folder, STAGED, name))
        except OSError as error:
            raise DataError(f"staged file {name} can't be read: {error}") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"staged file {name} differs from its receipt: delete {folder} and start again")
        tables.append(pa.ipc.open_file(pa.py_buffer(data)).read_all())
    return pa.concat_tables(tables)


def staged_rows(folder: str, receipts: Iterable[Receipt]) -> Iterator[tuple[pa.Array, dict[str, np.ndarray]]]:
    """Blocks of (doc_id, float16 vectors `n d` by column) of all documents that these units staged."""
    for receipt in receipts:
        if receipt["file"]:
            rows = _read(folder, [(receipt["file"], receipt["sha256"])]).combine_chunks()
            names = [name for name in rows.schema.names if name.endswith("_embedding")]
            for batch in rows.select(["doc_id", *names]).to_batches():
                yield batch["doc_id"], {name: vectors_numpy(batch[name]) for name in names}


def first_of_each(rows: pa.Table) -> pa.Table:
    """The first row of each doc_id: one upsert inserts duplicates of its own source (LanceDB 0.40)."""
    index = pa.array(range(len(rows)), pa.int64())
    keyed = pa.table({"doc_id": rows["doc_id"], "index": index})
    firsts = keyed.group_by("doc_id", use_threads=False).aggregate([("index", "min")])["index_min"]
    if len(firsts) == len(rows):
        return rows
    return rows.take(firsts.sort())
