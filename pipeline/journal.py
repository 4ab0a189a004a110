"""Journals: a unit of work is done only when its whole receipt stands in one.

Each worker appends one line a unit to the journal of the block that it runs; what a kill tore off counts as
never written. `Receipts` finds them again, in the order of the units.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.config import canonical_json
from infra.errors import DataError
from infra.storage import absolute, delete, filesystem, full_disk_told, is_remote, join, list_files, write_bytes
from pipeline.schema import content_id

JOURNAL = "journal"
Receipt = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One replayable piece of work: a stable id and what the worker needs, as JSON values."""

    id: str
    payload: dict[str, Any]


class Receipts:
    """The receipts of finished units, found by unit id; a torn or damaged line counts as never written."""

    def __init__(self, out: str) -> None:
        self.folder = join(out, JOURNAL)
        self._files: list[str] = []
        self._places: dict[str, tuple[int, int, int]] = {}  # unit id -> file, offset, length
        self.refresh()

    def __contains__(self, unit_id: str) -> bool:
        return unit_id in self._places

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Read the journals again: workers have written since."""
        self._files = list_files(self.folder, suffix=".jsonl")
        self._places.clear()
        for number, file in enumerate(self._files):
            for unit_id, offset, length in _scan(file):
                self._places.setdefault(unit_id, (number, offset, length))

    def get(self, unit_id: str) -> Receipt:
        try:
            number, offset, length = self._places[unit_id]
            fs, path = filesystem(self._files[number])
            with fs.open_input_file(path) as file:
                return json.loads(file.read_at(length, offset))
        except (KeyError, FileNotFoundError):
            raise DataError(
                f"the receipt of {unit_id} is gone from {self.folder}: another process works "
                "on this folder, or someone deleted it; cure: run the same command again"
            ) from None

    def in_order(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Receipt]]:
        """Each unit with its receipt, in the units' own order; what lets outputs be byte-identical."""
        for unit in units:
            yield unit, self.get(unit.id)

    def clear(self) -> None:
        """Delete the journals: only after the certificate is written."""
        delete(self.folder)


def _scan(file: str) -> Iterator[tuple[str, int, int]]:
    fs, path = filesystem(file)
    offset = 0
    with fs.open_input_stream(path, compression=None) as stream:
        rest = b""
        while chunk := stream.read(1 << 22):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                digest, _, text = line.partition(b"\t")
                unit_id, _, body = text.partition(b"\t")
                if body and digest == _digest(text):
                    yield unit_id.decode(), offset + len(line) - len(body), len(body)
                offset += len(line) + 1


def _digest(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


class JournalWriter:
    """Appends whole lines: locally by one write() each, on an object store one object each.

    `{folder}/{name}.jsonl`, or `{folder}/{name}/{unit}.jsonl`: a block's journal is found by its name,
    however many blocks there are, and what an earlier try wrote is never overwritten.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name
        self.file = None
        if not is_remote(folder):
            path = Path(absolute(folder))
            path.mkdir(parents=True, exist_ok=True)
            self.file = (path / f"{name}.jsonl").open("ab", buffering=0)
            if self.file.tell():
                self.file.write(b"\n")  # closes a line that a kill may have torn

    def append(self, unit_id: str, receipt: Receipt) -> None:
        text = unit_id.encode() + b"\t" + canonical_json(receipt)
        line = _digest(text) + b"\t" + text + b"\n"
        if self.file is not None:
            with full_disk_told(self.folder):
                self.file.write(line)
        else:
            write_bytes(join(self.folder, self.name, f"{content_id(unit_id)}.jsonl"), line)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def finished(self) -> set[str]:
        """Units of this journal that have a receipt."""
        here = [join(self.folder, f"{self.name}.jsonl")]
        files = list_files(join(self.folder, self.name)) if self.file is None else here
        return {unit_id for file in files for unit_id, _, _ in _scan(file)}
