"""Reads a clip's bytes from where they lie: files, rows of Parquet, members of tar archives.

A `local_uri` is a path, an object-store URI, or one of those with a fragment that names a piece:

    corpus/a.mp4                              the whole file
    corpus/t.parquet#row=17&column=image      one cell of a Parquet table
    corpus/t.tar#offset=1536&size=80211       one member of an uncompressed tar archive

A file whose own name ends like a piece is written with "#file" behind it (`file_uri`); all other names are
taken as they are: `Funny cat #shorts.mp4`, `What is this?.mp4`.

So nothing is copied out of the corpus, and every later job reads it through the two calls here.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.certificate import has_hash, is_trusted
from infra.errors import DataError
from infra.pictures import PictureError
from infra.storage import filesystem, is_remote, read_bytes
from pipeline.schema import RowError, Status

PIECE = re.compile(
    r"(?P<uri>.+)#(?:row=(?P<row>[0-9]{1,18})&column=(?P<column>.+)|offset=(?P<offset>[0-9]{1,18})&size=(?P<size>[0-9]{1,18})|file)",
    re.DOTALL,
)
IMAGE_SIGNATURES = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
)


def open_media(local_uri: str, sha256: str | None = None) -> str | bytes:
    """What `pipeline.media.frames` takes: the path itself, or the bytes of a piece.

    Args:
        local_uri: where the bytes lie.
        sha256: what a crawl found there; None = unknown. A whole file is compared with it once a process, but
            not in an object store: a decoder reads only some of it, and the store checks what it hands out.

    Raises:
        RowError: other bytes lie there now.
    """
    uri, piece = _fragment(local_uri)
    if piece:
        return read_media(local_uri, sha256)
    is_file = not is_remote(uri) and Path(uri).is_file()
    if sha256 and is_file and not is_trusted() and not has_hash(uri, sha256):
        raise _changed(local_uri)
    return uri


def read_media(local_uri: str, sha256: str | None = None) -> bytes:
    """The bytes behind a `local_uri`.

    `sha256` is what a crawl found there; None = unknown.

    Raises:
        FileNotFoundError: no such file.
        DataError: the file has no such row or member.
        RowError: other bytes lie there now.
    """
    data = _read(local_uri)
    if sha256 and not is_trusted() and hashlib.sha256(data).hexdigest() != sha256:
        raise _changed(local_uri)
    return data


def _changed(local_uri: str) -> RowError:
    return RowError(
        Status.CHANGED, f"{local_uri} holds other bytes than the crawl found: restore it, or crawl again"
    )


def _read(local_uri: str) -> bytes:
    uri, piece = _fragment(local_uri)
    if not piece:
        return read_bytes(uri)
    if "row" in piece:
        return _read_cell(uri, int(piece["row"]), piece["column"])
    return _read_range(uri, int(piece["offset"]), int(piece["size"]))


@contextmanager
def row_errors() -> Iterator[None]:
    """Turn what reading and decoding media raise into the `RowError` with the status that the row gets."""
    try:
        yield
    except PictureError as error:
        raise RowError(Status.TOO_LARGE if error.too_large else Status.UNDECODABLE, str(error)) from error
    except FileNotFoundError as error:
        raise RowError(Status.NOT_FOUND, str(error)) from error
    except (OSError, DataError) as error:
        raise RowError(Status.UNREACHABLE, str(error)) from error


def file_uri(path: str) -> str:
    """The `local_uri` of a whole file, whatever it is called."""
    return f"{path}#file" if PIECE.fullmatch(path) else path


def cell_uri(parquet_uri: str, row: int, column: str) -> str:
    return f"{parquet_uri}#row={row}&column={column}"


def member_uri(tar_uri: str, offset_bytes: int, size_bytes: int) -> str:
    return f"{tar_uri}#offset={offset_bytes}&size={size_bytes}"


def image_kind(head: bytes) -> str | None:
    """The picture format that the first bytes announce; None if it is not one that we know."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((kind for magic, kind in IMAGE_SIGNATURES if head.startswith(magic)), None)


def looks_like_text(head: bytes) -> bool:
    """Is this a page, a script or an error message rather than media?"""
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<script")):
        return True
    printable = sum(32 <= byte < 127 or byte in (9, 10, 13) for byte in head[:512])
    return bool(head) and printable == len(head[:512])


def _fragment(local_uri: str) -> tuple[str, dict[str, str]]:
    match = PIECE.fullmatch(local_uri)
    if match is None:
        return local_uri, {}
    return match["uri"], {key: text for key, text in match.groupdict().items() if text and key != "uri"}


def _read_cell(uri: str, row: int, column: str) -> bytes:
    starts = _row_group_starts(uri)
    group = next((g for g in range(len(starts) - 1) if starts[g] <= row < starts[g + 1]), None)
    if group is None:
        raise DataError(f"{uri} has {starts[-1]} rows, no row {row}")
    value: Any = _row_group(uri, group, column)[row - starts[group]].as_py()
    if isinstance(value, dict):  # {"bytes": ..., "path": ...}: how Hugging Face datasets store media
        value = value.get("bytes")
    return value or b""


def _read_range(uri: str, offset: int, size: int) -> bytes:
    if not is_remote(uri):
        with Path(uri).open("rb") as file:
            file.seek(offset)
            return file.read(size)
    fs, path = filesystem(uri)
    with fs.open_input_file(path) as file:
        return bytes(file.read_at(size, offset))


@lru_cache(maxsize=16)
def _row_group_starts(uri: str) -> list[int]:
    fs, path = filesystem(uri)
    metadata = pq.read_metadata(path, filesystem=fs)
    starts = [0]
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return starts


@lru_cache(maxsize=2)  # rows are read in order: the last group or two is what is wanted
def _row_group(uri: str, group: int, column: str) -> pa.ChunkedArray:
    fs, path = filesystem(uri)
    with pq.ParquetFile(path, filesystem=fs) as file:
        return file.read_row_group(group, columns=[column]).column(0)
