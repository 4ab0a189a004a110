"""The table of clips: duplicates marked (the first in order is kept), rows written in parts.

Exact duplicates are found by id, near ones by perceptual hash. That needs 20 bytes a row: ids and hashes are
arrays, not Python objects, so that 10^8 rows fit in 2 GB.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np

from infra.certificate import FileEntry
from infra.storage import join
from pipeline.media.phash import hamming
from pipeline.schema import CLIPS, Status
from pipeline.shards import shard_name, write_shard

Row = dict[str, Any]
ROWS_PER_PART = 50_000
"""Rows of one output file. Ours."""
MAX_BUCKET = 2000
"""A hash piece shared by more clips than this says nothing (flat pictures): skipped."""


def write_clips(
    out: str, rows: Callable[[], Iterator[Row]], near_bits: int | None
) -> tuple[list[FileEntry], Counter[str]]:
    """Rows in order (iterated twice) -> Parquet parts below `out`, and the rows of each status."""
    duplicates = find_duplicates(rows(), near_bits)
    statuses: Counter[str] = Counter()
    files = [
        write_shard(join(out, shard_name(number)), part, CLIPS, row_group_rows=8192)
        for number, part in enumerate(_parts(_marked(rows(), duplicates, statuses)))
    ]
    return files, statuses


def _marked(
    rows: Iterator[Row], duplicates: dict[int, tuple[Status, str]], statuses: Counter[str]
) -> Iterator[Row]:
    """The rows with the fates of duplicates, counted as they pass."""
    for number, row in enumerate(rows):
        if number in duplicates:
            status, error = duplicates[number]
            row = {**row, "status": status.value, "error": error}
        statuses[row["status"]] += 1
        yield row


def _parts(rows: Iterator[Row]) -> Iterator[Iterator[Row]]:
    """Runs of rows for one file, each to be consumed before the next."""
    for first in rows:
        yield chain([first], islice(rows, ROWS_PER_PART - 1))


def find_duplicates(rows: Iterable[Row], near_bits: int | None = None) -> dict[int, tuple[Status, str]]:
    """Row number -> fate of every good row that repeats an earlier good one.

    Rows are of `schema.CLIPS` (null columns may be absent) and iterated once. Near duplicates differ in at most
    `near_bits`; None = only exact ones are found.
    """
    numbers, ids, hashes, parents, lengths = bytearray(), bytearray(), bytearray(), bytearray(), bytearray()
    for number, row in enumerate(rows):
        if row["status"] == Status.OK.value:
            numbers += number.to_bytes(8, "little")
            ids += bytes.fromhex(row["clip_id"])
            if near_bits is not None:
                hashes += int(row.get("phash") or 0).to_bytes(8, "little")
                parents += bytes.fromhex((row.get("source_sha256") or "")[:16] or "0" * 16)
                lengths += np.float64(row["end_s"] - row["start_s"]).tobytes()
    index = np.frombuffer(numbers, np.uint64)
    fates = {
        int(index[n]): (Status.FILTERED_DUPLICATE, "same content, range and caption as an earlier row")
        for n in _repeats(np.frombuffer(ids, "S12"))
    }
    if near_bits is None:
        return fates
    pairs = near_pairs(np.frombuffer(hashes, np.uint64), near_bits)
    parent, length = np.frombuffer(parents, np.uint64), np.frombuffer(lengths, np.float64)
    for later, earlier, bits in sorted(pairs):
        a, b = int(index[later]), int(index[earlier])
        same_length = abs(length[later] - length[earlier]) <= 0.1
        if a in fates or b in fates or parent[later] == parent[earlier] or not same_length:
            continue
        fates[a] = (Status.FILTERED_NEAR_DUPLICATE, f"{bits} bits from row {b}")
    return fates


def _repeats(ids: np.ndarray) -> np.ndarray:
    """Positions of all but the first occurrence of each id."""
    _, first = np.unique(ids, return_index=True)
    is_repeat = np.ones(len(ids), bool)
    is_repeat[first] = False
    return np.flatnonzero(is_repeat)


def near_pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[int, int, int]]:
    """(later, earlier, distance) of hashes that differ in at most `bits` bits; 0 (flat) never matches.

    Split into bits + 1 pieces, two such hashes agree in at least one piece (pigeonhole): only equal
    pieces are compared.
    """
    seen: set[tuple[int, int]] = set()
    edges = np.linspace(0, 64, bits + 2).round().astype(int)
    for low, high in pairwise(edges.tolist()):
        piece = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(piece[order]) != 0, True])
        for start, end in pairwise(starts.tolist()):
            if 1 < end - start <= MAX_BUCKET:
                yield from _compare(hashes, order[start:end], bits, seen)


def _compare(
    hashes: np.ndarray, members: np.ndarray, bits: int, seen: set[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    for position, later in enumerate(members):
        for earlier in members[:position]:
            pair = (int(later), int(earlier))
            distance = hamming(int(hashes[later]), int(hashes[earlier]))
            if distance <= bits and hashes[later] and hashes[earlier] and pair not in seen:
                seen.add(pair)
                yield (*pair, distance)
