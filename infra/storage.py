"""Reads and writes files at local paths or pyarrow URIs (`s3://`, `gs://`, `file://`) by the same calls.

A write is whole or absent: local files are written beside their name and renamed, object stores put
atomically.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from infra.errors import ConfigError, DataError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str | Path) -> str:
    """The same place for every process: local paths absolute, URIs unchanged, no trailing slash."""
    text = str(uri)
    if is_remote(text):
        scheme, separator, place = text.partition("://")
        return scheme + separator + place.rstrip("/")
    return str(Path(text.removeprefix("file://")).expanduser().absolute())


GCS_PATIENCE_S = 20
"""How long Google's client tries again; its own quarter of an hour is a command without a word. Ours."""
STORE_OPTIONS = {"gs": f"?retry_limit_seconds={GCS_PATIENCE_S}", "s3": "?allow_delayed_open=true"}
"""Of pyarrow's filesystems, by scheme. Delayed: a small object is one request, not three for an upload."""


def filesystem(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of `uri` and the path in it.

    What follows the bucket is a key as it is: `#`, `?`, `%` and spaces are letters of it, as the other AWS and
    Google tools take them. S3 endpoints other than AWS's come from `AWS_ENDPOINT_URL`, as in those.

    Raises:
        ConfigError: a scheme that pyarrow doesn't know.
    """
    text = absolute(uri)
    if not is_remote(text):
        return pafs.LocalFileSystem(), text
    if text in ("s3://", "gs://"):
        raise ConfigError(f"{text} names no bucket", legal=f"{text}bucket/folder")
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if text.startswith("s3://") and endpoint:
        scheme, _, host = endpoint.partition("://")
        store = pafs.S3FileSystem(endpoint_override=host, scheme=scheme, allow_delayed_open=True)
        return store, text.removeprefix("s3://")
    scheme, _, rest = text.partition("://")
    bucket, slash, key = rest.partition("/")
    try:  # of a whole URI it would cut the key
        fs, place = pafs.FileSystem.from_uri(f"{scheme}://{bucket}{STORE_OPTIONS.get(scheme, '')}")
        return fs, place + slash + key
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(
            f"can't open {text}: {error}", legal="a local path, s3://, gs://, hdfs:// or file://"
        ) from None


def join(uri: str | Path, *parts: str) -> str:
    """Join below `uri`, refusing parts that climb out of it (names may come from hostile files).

    Raises:
        DataError: an absolute part or one with `..`.
    """
    for part in parts:
        pieces = part.replace("\\", "/").split("/")
        if part.startswith("/") or ".." in pieces or "\0" in part:
            raise DataError(f"path {part!r} climbs out of {uri}")
    return "/".join([str(uri).rstrip("/"), *parts])


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def is_file(uri: str) -> bool:
    """Whether a file lies there, or anything else in which nothing can lie."""
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type in (pafs.FileType.File, pafs.FileType.Unknown)


def size_and_time(uri: str) -> tuple[int, int | None]:
    """Size of a file and when it was changed, in ns; 0 and None where there is none."""
    fs, path = filesystem(uri)
    info = fs.get_file_info(path)
    return info.size or 0, info.mtime_ns


def size_bytes(uri: str | Path) -> int:
    """Size of a file; 0 where there is none."""
    fs, path = filesystem(uri)
    return fs.get_file_info(path).size or 0


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    with fs.open_input_stream(path, compression=None) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes, *, synced: bool = True) -> None:
    """Write whole or not at all; a reader never sees a part. What isn't synced a power cut may still lose."""
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        with full_disk_told(uri):
            _write_local(Path(path), data, synced)
        return
    make_folder(uri.rpartition("/")[0])
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(data)


def make_folder(uri: str) -> None:
    """Make a folder and those above it; an object store has none, and markers of them would cost requests."""
    fs, path = filesystem(uri)
    if fs.type_name not in ("s3", "gcs"):
        fs.create_dir(path, recursive=True)


def _write_local(target: Path, data: bytes, synced: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Named before it is there, or a stop signal between the two would leave it.
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with part.open("xb") as file:
            file.write(data)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def full_disk_told(uri: str | Path) -> Iterator[None]:
    """A disk that is full or broken is a line, not a traceback: everything that writes large data runs in here.

    Raises:
        DataError: no space, no quota, an I/O error; other OSErrors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DataError(
            f"can't write {uri}: {error.strerror}; cure: make room, then the same command continues"
        ) from error


def list_files(uri: str, *, suffix: str = "", recursive: bool = True) -> list[str]:
    """Files below `uri` in name order, as URIs that `read_bytes` takes; [] when there is no such place."""
    fs, path = filesystem(uri)
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    base = absolute(uri)
    found = [
        base + info.path[len(path) :]
        for info in fs.get_file_info(selector)
        if info.type == pafs.FileType.File and info.path.endswith(suffix)
    ]
    return sorted(found)


def delete(uri: str) -> None:
    """Delete a file or a folder; nothing to delete is fine."""
    fs, path = filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def check_writable(uri: str, *, cure: str = "choose another --out or mend its permissions") -> None:
    """Raise ConfigError unless a file can be written below `uri`; leaves nothing behind."""
    probe = join(absolute(uri), f".writable-{os.getpid()}-{time.time_ns()}")
    try:
        try:
            write_bytes(probe, b"")
        finally:
            delete(probe)  # also when a stop signal comes between the two
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"can't write to {uri}: {reason}", cure=cure) from None


def free_bytes(uri: str) -> int | None:
    """Room on the disk of a local place; None for an object store."""
    place = Path(absolute(uri))
    if is_remote(uri):
        return None
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def sha256_file(uri: str) -> str:
    """Hex sha256 of a file's bytes, read in bounded chunks."""
    digest = hashlib.sha256()
    for chunk in stream_bytes(uri):
        digest.update(chunk)
    return digest.hexdigest()


def stream_bytes(uri: str) -> Iterator[bytes]:
    """The file in pieces of a MiB."""
    fs, path = filesystem(uri)
    with fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(1 << 20):
            yield chunk


def read_json(uri: str) -> Any:
    """The values of a JSON file.

    Raises:
        DataError: it isn't JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise DataError(f"{uri} is not JSON: {error}; cure: restore it, or make it again") from None


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def user_cache() -> Path:
    """The user's own cache folder, `$XDG_CACHE_HOME/vimi` or `~/.cache/vimi`: nobody else may look into it.

    Raises:
        DataError: it can't be made, is a link, belongs to somebody else, or is open to others.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (named if named.is_absolute() else Path.home() / ".cache") / "vimi"
    cure = "cure: set XDG_CACHE_HOME to a place of your own"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = folder.lstat()
    except OSError as error:
        raise DataError(f"can't make the cache folder {folder}: {error.strerror}; {cure}") from None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise DataError(f"the cache folder {folder} is a link, or others may write there; {cure}, or delete it")
    if facts.st_mode & 0o055:
        folder.chmod(0o700)
    return folder
