"""Tables that list clips: CSV, JSONL or Parquet; one row a clip, or lists of clips in a row; lists of URLs.

Columns are found by their usual names, or by a mapping {ours: theirs}. A Parquet column of bytes is
media itself: its cells are referenced, not copied. Neighbouring rows of one parent become one item.
"""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, groupby, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import ConfigError, DataError, first_line
from infra.storage import absolute, filesystem, is_remote, sha256_file
from pipeline.clips.sources.base import (
    Cut,
    Item,
    Reader,
    SourceConfig,
    is_text,
    is_url,
    media_of,
    names_in,
    require_path,
    suffix_of,
    without_credentials,
)
from pipeline.clips.sources.captions import CAPTION_KEYS, cuts_of, make_cut
from pipeline.media.store import cell_uri, file_uri
from pipeline.schema import Status

COLUMNS: dict[str, tuple[str, ...]] = {
    "uri": (
        *("uri", "url", "URL", "video_url", "image_url", "contentUrl", "video", "image", "clip"),
        *("path", "video_path", "image_path", "file", "file_name", "filename"),
    ),
    "caption": (*CAPTION_KEYS, "name", "TEXT", "sentence", "captions"),
    "start_s": ("start_s", "start", "start_time", "begin"),
    "end_s": ("end_s", "end", "end_time"),
    "timestamps": ("timestamps", "timestamp"),
    "split": ("split",),
    "licence": ("licence", "license"),
}
"""Our name -> names that corpora use, the first one found wins."""
MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
LISTINGS = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables that, lying at the top of a folder, describe it (Hugging Face's imagefolder and ours)."""
Row = dict[str, Any] | str
"""A line of a table, or why it is none."""
LOOK_AHEAD_ROWS = 1000
"""JSON lines need not all have the same keys: so many are looked at for the names of columns."""


class ManifestReader(Reader):
    """The rows of one table."""

    def __init__(self, config: SourceConfig) -> None:
        self.path = require_path(config.path)
        self.root = self.path.rpartition("/")[0]
        self.allow_outside_root = config.allow_outside_root
        self.wanted = config.columns
        unknown = sorted(set(config.columns) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"columns of {config.path}: {unknown}", legal=", ".join(COLUMNS))
        try:
            self.bytes_columns = _bytes_columns(self.path)
            self.columns = self._find_columns()
        except DataError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def recognise(cls, path: str) -> SourceConfig | None:
        if suffix_of(path.removesuffix(".gz")) in MANIFESTS:
            return SourceConfig(kind="manifest", path=path)
        top = names_in(path)
        listing = next((name for name in LISTINGS if name in top), None)
        if listing is None:
            return None
        folder = absolute(path)
        return SourceConfig(kind="manifest", path=f"{folder}/{listing}", name=folder.split("/")[-1])

    def items(self) -> Iterator[Item]:
        numbered = enumerate(self._rows())
        parents = (self._item(number, row) for number, row in numbered)
        for _, group in groupby(parents, key=lambda item: (item.uri, item.status, item.split)):
            first, *rest = group
            cuts = first.cuts + tuple(cut for item in rest for cut in item.cuts)
            yield replace(first, cuts=cuts)

    def fingerprint(self) -> str:
        return sha256_file(self.path)[:16]

    def _find_columns(self) -> dict[str, str]:
        head = (row for row in islice(self._rows(), LOOK_AHEAD_ROWS) if isinstance(row, dict))
        names = list(dict.fromkeys(chain(*head, self.bytes_columns)))
        found = {}
        for ours, theirs in COLUMNS.items():
            name = self.wanted.get(ours) or next((t for t in theirs if t in names), None)
            if name is not None:
                found[ours] = name
        absent = sorted({name for name in self.wanted.values() if names and name not in names})
        if absent or (names and "uri" not in found):
            raise ConfigError(
                f"{self.path} has no column {absent or 'that names a video or picture'}",
                legal=f"its columns: {', '.join(names)}",
                cure="map it: columns: {uri: <name>, caption: <name>}",
            )
        return found

    def _item(self, number: int, row: Row) -> Item:
        place = f"{self.path}#line={number}"
        if isinstance(row, str):
            return _bad(place, Status.BAD_ROW, row)
        value = row.get(self.columns.get("uri", ""))
        ours = {name: row.get(column) for name, column in self.columns.items() if name != "uri"}
        texts = {name: ours.get(name) for name in ("split", "licence")}
        extra = {
            k: str(v).encode("utf-8", "replace").decode() if v is not None else None for k, v in texts.items()
        }
        cuts = cuts_of({k: v for k, v in ours.items() if k not in extra})
        if self.columns.get("uri") in self.bytes_columns:
            uri = cell_uri(self.path, number, self.columns["uri"])
            return Item(uri, "auto", cuts, **extra)
        if not isinstance(value, str) or not value.strip():
            return _bad(place, Status.BAD_ROW, f"no video or picture named: {value!r}", cuts)
        if "\0" in value or not is_text(value):
            return _bad(place, Status.BAD_ROW, "the name is not UTF-8", cuts)
        return self._resolve(value.strip(), cuts, extra)

    def _resolve(self, name: str, cuts: tuple[Cut, ...], extra: dict[str, str | None]) -> Item:
        """A relative path lies below the manifest; climbing out is refused unless allowed."""
        if is_url(name):
            return Item(name, media_of(name), cuts, **extra)
        outside = is_remote(name) or name.startswith(("/", "~", "file:", "\\"))
        parts = name.replace("\\", "/").split("/")
        inside = name.startswith(self.root + "/") and ".." not in parts
        if (outside or ".." in parts) and not inside and not self.allow_outside_root:
            error = "the path leaves the manifest's folder; allow_outside_root permits it"
            return _bad(name, Status.REFUSED, error, cuts)
        uri = absolute(name) if outside else f"{self.root}/{name.removeprefix('./')}"
        return Item(uri if is_remote(uri) else file_uri(uri), media_of(uri), cuts, **extra)

    def _rows(self) -> Iterator[Row]:
        kind = suffix_of(self.path.removesuffix(".gz"))
        with readable(self.path):
            if kind == ".parquet":
                yield from _parquet_rows(self.path, self.bytes_columns)
            elif kind in (".jsonl", ".ndjson", ".json"):
                yield from _jsonl_rows(self.path)
            else:
                yield from _csv_rows(self.path)


class UrlReader(Reader):
    """A list of addresses, each with its caption after a tab if there is one (LAION, CC: no header).

    Empty lines and those that start with # are skipped.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.path = require_path(config.path)

    @classmethod
    def recognise(cls, path: str) -> SourceConfig | None:
        is_list = suffix_of(path.removesuffix(".gz")) == ".txt"
        return SourceConfig(kind="urls", path=path) if is_list else None

    def items(self) -> Iterator[Item]:
        for number, line in enumerate(self._lines()):
            url, _, caption = line.strip().partition("\t")
            if not url or url.startswith("#"):
                continue
            cuts = (make_cut(caption or None),)
            if is_url(url) and url.isprintable():
                yield Item(url, media_of(url), cuts)
            else:
                place = f"{self.path}#line={number}"
                yield Item(place, "auto", (Cut(),), status=Status.BAD_ROW.value, error="not an address")

    def _lines(self) -> Iterator[str]:
        with readable(self.path):
            yield from text_lines(self.path)

    def fingerprint(self) -> str:
        return sha256_file(self.path)[:16]


def _bad(uri: str, status: Status, error: str, cuts: tuple[Cut, ...] = (Cut(),)) -> Item:
    return Item(without_credentials(uri), "auto", cuts, status=status.value, error=error)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn what a damaged table raises while it is read into one line.

    Raises:
        DataError: names the table.
    """
    try:
        yield
    except (OSError, EOFError, pa.ArrowException, csv.Error) as error:
        raise DataError(
            f"{path} can't be read: {first_line(error)}; cure: restore it, or leave it out"
        ) from None


def text_lines(path: str) -> Iterator[str]:
    """Lines of a text file, streamed; bytes that are not UTF-8 survive as surrogates."""
    fs, name = filesystem(path)
    with fs.open_input_stream(name, compression="detect") as stream:
        yield from io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")


def _csv_rows(path: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # Panda-70M's lists of captions are long
    delimiter = "\t" if path.removesuffix(".gz").endswith(".tsv") else ","
    lines = (line.replace("\0", "") for line in text_lines(path))
    reader = csv.DictReader(lines, delimiter=delimiter)
    for row in reader:
        if None in row:
            yield f"{len(row[None])} cells too many"  # pyright: ignore[reportArgumentType]
        else:
            yield {key: value if value != "" else None for key, value in row.items()}


def _jsonl_rows(path: str) -> Iterator[Row]:
    for line in text_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"not JSON: {error}"
        else:
            yield value if isinstance(value, dict) else f"a {type(value).__name__}, not a mapping"


def _parquet_rows(path: str, skip: set[str]) -> Iterator[dict[str, Any]]:
    fs, name = filesystem(path)
    with pq.ParquetFile(name, filesystem=fs) as file:
        columns = [c for c in file.schema_arrow.names if c not in skip]
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            yield from batch.to_pylist()


def _bytes_columns(path: str) -> set[str]:
    """Columns of a Parquet table that hold media: bytes, or the {bytes, path} of HF datasets."""
    if not path.endswith(".parquet"):
        return set()
    fs, name = filesystem(path)
    with readable(path):
        return {f.name for f in pq.read_schema(name, filesystem=fs) if _holds_bytes(f.type)}


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(f.name == "bytes" and _holds_bytes(f.type) for f in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
