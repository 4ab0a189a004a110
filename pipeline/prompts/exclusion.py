"""Reads the evaluation exclusion file: what may neither be retrieved nor trained on.

    .txt       one entry a line (`#` begins a comment): an id, a sha256, or a source video
    .csv .jsonl .parquet   any of the columns in `COLUMNS`; others are ignored

A source video is a path, a URL, or the name that `source_pattern` finds in one.
"""

import csv
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.certificate import check_certified
from infra.errors import ConfigError, first_line
from infra.storage import exists, read_bytes
from pipeline.schema import content_id

COLUMNS = {
    "id": "ids",
    "clip_id": "ids",
    "doc_id": "ids",
    "sha256": "hashes",
    "source_sha256": "hashes",
    "source_uri": "sources",
    "source": "sources",
    "video_id": "sources",
    "url": "sources",
    "phash": "phashes",
}
_ID, _SHA = re.compile(r"[0-9a-f]{24}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Exclusion:
    """What an exclusion file lists."""

    ids: frozenset[str] = frozenset()
    """clip_id or doc_id."""
    hashes: frozenset[str] = frozenset()
    """Hex sha256 of a source's bytes."""
    sources: frozenset[str] = frozenset()
    """Names of source videos, as `source_name` gives them."""
    phashes: tuple[int, ...] = field(default=())
    """Perceptual hashes; near ones count as well."""

    def __bool__(self) -> bool:
        return bool(self.ids or self.hashes or self.sources or self.phashes)

    def __or__(self, other: "Exclusion") -> "Exclusion":
        """What either of the two lists."""
        return Exclusion(
            self.ids | other.ids,
            self.hashes | other.hashes,
            self.sources | other.sources,
            tuple(sorted({*self.phashes, *other.phashes})),
        )


def read_exclusion(uri: str, *, source_pattern: str | None = None) -> Exclusion:
    """Read an exclusion file.

    Raises:
        ConfigError: no such file, an unknown format, or a table without any known column.
        DataError: one that `benchmark` wrote, and that has changed since.
    """
    if not exists(uri):
        raise ConfigError(f"no exclusion file at {uri}", cure="mend guard.exclude, or set it to null")
    check_certified(uri, must_list=False)
    data, kind = read_bytes(uri), uri.rpartition(".")[2].lower()
    try:
        if kind == "parquet":
            columns = pq.read_table(pa.BufferReader(data)).to_pydict()
        elif kind == "csv":
            columns = _columns(csv.DictReader(io.StringIO(data.decode())))
        elif kind == "jsonl":
            columns = _columns(json.loads(line) for line in data.splitlines() if line.strip())
        elif kind == "txt":
            lines = [line.partition("#")[0].strip() for line in data.decode().splitlines()]
            columns = _sorted_out(filter(None, lines))
        else:
            raise ConfigError(f"exclusion file {uri}", legal=".txt, .csv, .jsonl or .parquet")
    except (pa.ArrowException, ValueError, AttributeError, csv.Error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"can't read exclusion file {uri}: {first_line(error)}") from None
    known = {name: values for name, values in columns.items() if name in COLUMNS}
    if not known:
        raise ConfigError(
            f"exclusion file {uri} has the columns {', '.join(columns) or 'none'}",
            legal=f"any of {', '.join(COLUMNS)}",
        )
    return _exclusion(known, source_pattern)


def exclusion_of(rows: Iterable[dict], *, source_pattern: str | None = None) -> Exclusion:
    """The same of rows in memory; columns that are not in `COLUMNS` are ignored."""
    columns = {name: values for name, values in _columns(rows).items() if name in COLUMNS}
    return _exclusion(columns, source_pattern)


def _columns(rows: Iterable[dict]) -> dict[str, list]:
    columns: dict[str, list] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _sorted_out(entries: Iterable[str]) -> dict[str, list]:
    columns: dict[str, list] = {"id": [], "sha256": [], "source": []}
    for entry in entries:
        is_sha, is_id = _SHA.fullmatch(entry.lower()), _ID.fullmatch(entry.lower())
        columns["sha256" if is_sha else "id" if is_id else "source"].append(entry)
    return columns


def _exclusion(columns: dict[str, list], source_pattern: str | None) -> Exclusion:
    found: dict[str, set] = {"ids": set(), "hashes": set(), "sources": set(), "phashes": set()}
    for name, values in columns.items():
        kind = COLUMNS[name]
        for value in values:
            if value is None or value == "":
                continue
            if kind == "phashes":
                found[kind].add(_phash(value))
            elif kind == "sources":
                found[kind].add(source_name(str(value), source_pattern))
            else:
                found[kind].add(str(value).strip().lower())
    return Exclusion(
        frozenset(found["ids"]),
        frozenset(found["hashes"]),
        frozenset(found["sources"]),
        tuple(sorted(found["phashes"] - {0})),
    )


def _phash(value: object) -> int:
    try:
        return int(value, 16) if isinstance(value, str) else int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise ConfigError(f"phash {value!r}", legal="an integer, or 16 hex digits") from None


def source_name(uri: str, pattern: str | None = None) -> str:
    """The name of the source video behind a path or URL: equal for all of its clips.

    Args:
        uri: path or URL.
        pattern: regular expression whose first group is the name; tried first.
    """
    text = uri.strip().removeprefix("file://")
    if pattern and (match := re.search(pattern, text)):
        return match.group(1)
    if "://" not in text:
        return text
    parts = urlsplit(text)
    host = (parts.hostname or "").removeprefix("www.").removeprefix("m.")
    if host == "youtu.be":
        return parts.path.strip("/")
    if host in ("youtube.com", "youtube-nocookie.com"):
        names = parse_qs(parts.query).get("v") or [parts.path.rstrip("/").rpartition("/")[2]]
        return names[0]
    query = f"?{parts.query}" if parts.query else ""
    return f"{host}{parts.path}{query}"


@lru_cache(maxsize=1 << 14)
def key(text: str | None) -> int:
    """64 bits that stand for a string in an array; 0 for none."""
    return int(content_id("key", text)[:16], 16) or 1 if text else 0


def keys(texts: Iterable[str | None]) -> np.ndarray:
    return np.fromiter((key(text) for text in texts), np.uint64)
