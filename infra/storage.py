"""Reads and writes files at local paths or pyarrow URIs (`s3://`, `gs://`, `file://`) by the same calls.

A write is whole or absent: local files are written beside their name and renamed, object stores put
atomically. `Certificate` is the JSON that says that a job's output is whole; it is written last.
"""

import errno
import hashlib
import json
import os
import stat
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from pydantic import BaseModel, ConfigDict, Field

from infra.errors import ConfigError, DataError, first_line

CERTIFICATE = "certificate.json"
VERSION = "0.1.0"
TRUST = "VIMI_TRUST"
"""Environment variable: 1 = files are not compared with their certificate when they are first read."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str | Path) -> str:
    """The same place for every process: local paths absolute, URIs unchanged, no trailing slash."""
    text = str(uri)
    if is_remote(text):
        return text.rstrip("/")
    return str(Path(text.removeprefix("file://")).expanduser().absolute())


def filesystem(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of `uri` and the path in it.

    S3 endpoints other than AWS's come from `AWS_ENDPOINT_URL`, as in the other AWS tools.

    Raises:
        ConfigError: a scheme that pyarrow doesn't know.
    """
    text = absolute(uri)
    if not is_remote(text):
        return pafs.LocalFileSystem(), text
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if text.startswith("s3://") and endpoint:
        scheme, _, host = endpoint.partition("://")
        return pafs.S3FileSystem(
            endpoint_override=host, scheme=scheme, allow_bucket_creation=True
        ), text.removeprefix("s3://")
    try:
        return pafs.FileSystem.from_uri(text)
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


def size_bytes(uri: str) -> int:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).size or 0


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    with fs.open_input_stream(path, compression=None) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write whole or not at all; a reader never sees a part."""
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        with full_disk_told(uri):
            _write_local(Path(path), data)
        return
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(data)


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
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


def check_writable(uri: str) -> None:
    """Raise ConfigError unless a file can be written below `uri`; leaves nothing behind."""
    probe = join(absolute(uri), f".writable-{os.getpid()}-{time.time_ns()}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"can't write to {uri}: {reason}", cure="choose another --out or mend its permissions"
        ) from None


def sha256_file(uri: str) -> str:
    """Hex sha256 of a file's bytes, read in bounded chunks."""
    digest = hashlib.sha256()
    for chunk in stream_bytes(uri):
        digest.update(chunk)
    return digest.hexdigest()


def stream_bytes(uri: str, *, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
    fs, path = filesystem(uri)
    with fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(chunk_bytes):
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


def write_sealed(uri: str, values: dict[str, Any]) -> None:
    """Write JSON that carries the hash of its own values: `read_sealed` refuses it once a bit has flipped."""
    write_json(uri, {**values, _SEAL: _seal(values)})


def read_sealed(uri: str) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        DataError: not JSON, or not what was written.
    """
    values = read_json(uri)
    if not isinstance(values, dict) or values.pop(_SEAL, None) != _seal(values):
        raise DataError(f"{uri} was damaged or edited: it is not what its own hash says; cure: restore it")
    return values


_SEAL = "sealed"


def _seal(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class FileEntry(BaseModel):
    """One file of a certified output."""

    model_config = ConfigDict(frozen=True)
    path: str
    """Relative to the certificate's folder."""
    rows: int
    num_bytes: int
    sha256: str


class Certificate(BaseModel):
    """The JSON that says that an output is whole: in = out + filtered + dead, and every file's hash."""

    model_config = ConfigDict(frozen=True)
    job: str
    config_hash: str
    num_in: int
    num_out: int
    filtered: dict[str, int] = Field(default_factory=dict)
    """Rows left out on purpose, by reason."""
    dead: dict[str, int] = Field(default_factory=dict)
    """Rows that failed, by status."""
    files: list[FileEntry] = Field(default_factory=list)
    inputs: dict[str, str] = Field(default_factory=dict)
    """Name of the input -> content hash of its certificate (`Certificate.content_hash`)."""
    facts: dict[str, Any] = Field(default_factory=dict)
    """What else this job proves: recall, model identity, memory version, ..."""
    version: str = VERSION
    created_at_s: float = 0.0
    wall_s: float = 0.0

    def check(self) -> None:
        """Raise DataError unless every input row is accounted for."""
        accounted = self.num_out + sum(self.filtered.values()) + sum(self.dead.values())
        if accounted != self.num_in:
            raise DataError(
                f"{self.job}: {self.num_in} rows in, but {self.num_out} out + filtered "
                f"{self.filtered} + dead {self.dead} = {accounted}"
            )

    def content_hash(self) -> str:
        """Hash of what the output *is*: times and durations left out."""
        values = self.model_dump(mode="json", exclude={"created_at_s", "wall_s"})
        text = json.dumps(values, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_certificate(uri: str | Path, certificate: Certificate) -> None:
    """Check the conservation law, then certify; call it last."""
    certificate.check()
    write_sealed(join(uri, CERTIFICATE), certificate.model_dump(mode="json"))


def read_certificate(uri: str | Path, *, job: str | None = None) -> Certificate | None:
    """The certificate of the output at `uri`; None when there is none.

    Raises:
        DataError: not a certificate, a damaged one, or that of another job.
    """
    place = join(absolute(uri), CERTIFICATE)
    if not exists(place):
        return None
    try:
        certificate = Certificate.model_validate(read_sealed(place))
    except ValueError as error:
        raise DataError(f"{place} is not a certificate: {first_line(error)}") from None
    if job is not None and certificate.job != job:
        raise DataError(f"{uri} was made by {certificate.job!r}, expected the output of {job!r}")
    return certificate


def require_certificate(uri: str | Path, *, job: str, made_by: str) -> Certificate:
    """The certificate of an input.

    Raises:
        ConfigError: nothing certified there; `made_by` names the command that makes it.
    """
    try:
        certificate = read_certificate(uri, job=job)
    except DataError as error:
        raise ConfigError(str(error), cure=f"give the output of `{made_by}`") from None
    if certificate is None:
        raise ConfigError(
            f"no certified {job} output at {uri}",
            legal=f"a folder that holds {CERTIFICATE}",
            cure=f"run `{made_by}` first, or again if it was stopped",
        )
    return certificate


def file_entries(folder: str, places: list[str]) -> list[FileEntry]:
    """Entries for a certificate in `folder` of files that lie below it; rows are not counted."""
    with ThreadPoolExecutor(8) as pool:  # hashing lets go of the interpreter
        hashes = list(pool.map(sha256_file, places))
    start = len(absolute(folder)) + 1
    return [
        FileEntry(path=place[start:], rows=0, num_bytes=size_bytes(place), sha256=digest)
        for place, digest in zip(places, hashes, strict=True)
    ]


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


_checked: dict[str, tuple[str, Any, Any]] = {}
_listed: dict[str, tuple[Any, dict[str, FileEntry]]] = {}
_locks: dict[str, threading.Lock] = defaultdict(threading.Lock)


def check_files(folder: str, entries: Iterable[FileEntry]) -> None:
    """Refuse files that are not the ones that were certified: each is read through once a process.

    Every reader of a certified output calls this before it opens a file; `VIMI_TRUST=1` skips it.

    Args:
        folder: the certificate's.
        entries: of the certificate: the files that are about to be read.

    Raises:
        DataError: a file is missing, truncated or changed.
    """
    if os.environ.get(TRUST, "0") not in ("", "0"):
        return
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: _check_file(join(absolute(folder), entry.path), entry), entries))


def _check_file(place: str, entry: FileEntry) -> None:
    with _locks[place]:
        fs, path = filesystem(place)
        info = fs.get_file_info(path)
        state = (entry.sha256, info.size, info.mtime_ns)
        if _checked.get(place) == state:
            return
        if info.type != pafs.FileType.File:
            wrong = "is missing"
        elif info.size != entry.num_bytes or sha256_file(place) != entry.sha256:
            wrong = "is not the file that was certified: it was damaged or changed"
        else:
            _checked[place] = state
            return
        raise DataError(f"{place} {wrong}; cure: restore it, or delete its folder and make it again")


def check_certified(uri: str) -> None:
    """`check_files` for one file by its place: its certificate lies beside it.

    Raises:
        DataError: it is missing, truncated or changed, or its certificate doesn't list it.
    """
    folder, _, name = absolute(uri).rpartition("/")
    fs, path = filesystem(join(folder, CERTIFICATE))
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        return  # nothing was promised
    state, listed = _listed.get(folder, (None, {}))
    if state != (info.size, info.mtime_ns):
        certificate = read_certificate(folder)
        listed = {entry.path: entry for entry in certificate.files} if certificate else {}
        _listed[folder] = (info.size, info.mtime_ns), listed
    if name not in listed:
        raise DataError(f"{uri} is not in the certificate of its folder; cure: make that folder again")
    check_files(folder, [listed[name]])
