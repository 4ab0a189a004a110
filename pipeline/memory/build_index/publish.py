"""What a version of the memory has besides its shards: BM25's statistics, a sample, a tag."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from infra.certificate import CERTIFICATE, FileEntry, file_entries
from infra.storage import absolute, exists, join, list_files, write_bytes
from pipeline.journal import Receipt
from pipeline.memory.build_index.shards import SAMPLE_ROWS
from pipeline.memory.retrieve.bm25 import Statistics
from pipeline.memory.store import (
    EMBEDDINGS,
    LANCE_FOLDER,
    SHARDS,
    arrow_bytes,
    check_shard,
    lance_dataset,
    open_table,
    read_table,
    sample_name,
    words_name,
)
from pipeline.memory.tile import read_words

UNCERTIFIED = ("/data/", "/_transactions/", "/latest_version_hint.json")
"""Files of Lance that the shards' own certificates name, or that no reader of a certified version depends
on."""


def publish(out: str, facts: dict[str, Any], smallest: Sequence[tuple[str, int]]) -> None:
    """Write a version's statistics and sample, and tag it.

    Args:
        out: the memory, its fragments committed.
        facts: of the certificate that the version gets.
        smallest: (id, number) of the new documents with the smallest ids.
    """
    tag = facts["memory_version"]
    before = join(out, sample_name(facts["versions"][-2])) if len(facts["versions"]) > 1 else None
    known = read_table(before) if before and exists(before) else None
    there = (
        [] if known is None else list(zip(*(known[n].to_pylist() for n in ("doc_id", "number")), strict=True))
    )
    chosen = [number for _, number in sorted({*there, *smallest})[:SAMPLE_ROWS]]
    sample = lance_dataset(out).take(chosen, columns=["doc_id", "source_uri", "source_sha256", *EMBEDDINGS])
    sample = sample.append_column("number", pa.array(chosen, pa.int64()))
    write_bytes(join(out, sample_name(tag)), arrow_bytes(sample))
    for shard in facts["shards"]:
        check_shard(out, shard["name"], parts=["words", "lengths"])  # those of a memory that grows are old
    totals = Statistics.total(read_words(out, shard["name"]) for shard in facts["shards"])
    counts = {"documents": str(totals.documents), "words": str(totals.words)}
    words = pa.table({"hash": totals.hashes, "count": totals.counts}).replace_schema_metadata(counts)
    write_bytes(join(out, words_name(tag)), arrow_bytes(words))
    tag_latest(out, tag)


def tag_latest(out: str, tag: str) -> None:
    """Let a tag name the table's latest version."""
    table: Any = open_table(out)
    if tag in table.tags.list():
        table.tags.update(tag, table.version)
    else:
        table.tags.create(tag, table.version)


def smallest(receipts: Sequence[Receipt], first: int) -> list[tuple[str, int]]:
    """(id, number) of the documents with the smallest ids of new shards, the first of which is number
    `first`.
    """
    found = []
    for receipt in receipts:
        found += [(doc_id, first + row) for doc_id, row in receipt["smallest"]]
        first += receipt["rows"]
    return found


def own_files(out: str, facts: dict[str, Any]) -> list[FileEntry]:
    """The memory's files but for the shards' own, for its certificate."""
    base, versions = absolute(out), facts["versions"]
    places = [p for p in list_files(join(base, LANCE_FOLDER)) if not any(part in p for part in UNCERTIFIED)]
    places += [join(base, name(tag)) for tag in versions for name in (words_name, sample_name)]
    places += [join(base, SHARDS, shard["name"], CERTIFICATE) for shard in facts["shards"]]
    return file_entries(base, places)
