"""Certifies outputs and checks them: the JSON that says that an output is whole, and the hashes it vouches for.

A certificate is written last. Whoever reads a certified file compares it with its entry first, once a process;
JSON that decides something carries the hash of its own values.
"""

import hashlib
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from pydantic import BaseModel, ConfigDict, Field

from infra.errors import ConfigError, DataError, first_line
from infra.storage import absolute, exists, filesystem, join, read_json, sha256_file, size_bytes, write_json

CERTIFICATE = "certificate.json"
VERSION = "0.1.0"
TRUST = "VIMI_TRUST"
"""Environment variable: 1 = files are not compared with their certificate when they are first read."""
SEAL = "sealed"
"""Key of the hash that `write_sealed` adds."""
_checked: dict[str, tuple[str, Any, Any]] = {}
"""Place -> hash, size and time of change of a file that this process has found whole."""
_listed: dict[str, tuple[Any, "dict[str, FileEntry]"]] = {}
"""Folder -> (size, time of change) of its certificate, and what that lists."""
_locks: dict[str, threading.Lock] = defaultdict(threading.Lock)


def write_sealed(uri: str, values: dict[str, Any]) -> None:
    """Write JSON that carries the hash of its own values: `read_sealed` refuses it once a bit has flipped."""
    write_json(uri, {**values, SEAL: _seal(values)})


def read_sealed(uri: str) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        DataError: not JSON, or not what was written.
    """
    values = read_json(uri)
    if not isinstance(values, dict) or values.pop(SEAL, None) != _seal(values):
        raise DataError(
            f"{uri} was damaged, edited or made by an earlier version; cure: restore it, or make it again"
        )
    return values


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
        raise DataError(
            f"{place} is not a certificate: {first_line(error)}; cure: make its folder again"
        ) from None
    if job is not None and certificate.job != job:
        raise DataError(f"{uri} was made by {certificate.job!r}, expected the output of {job!r}")
    return certificate


def input_certificate(uri: str | Path) -> Certificate | None:
    """As `read_certificate`; a damaged one is the input's fault, so the command is wrong.

    Raises:
        ConfigError: damaged.
    """
    try:
        return read_certificate(uri)
    except DataError as error:
        raise ConfigError(str(error)) from None


def require_certificate(uri: str | Path, *, job: str, made_by: str) -> Certificate:
    """The certificate of an input.

    Raises:
        ConfigError: nothing certified there; `made_by` names the command that makes it.
    """
    certificate = input_certificate(uri)
    if certificate is not None and certificate.job != job:
        raise ConfigError(f"{uri} was made by {certificate.job!r}", cure=f"give the output of `{made_by}`")
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


def entry_of(path: str, data: bytes, rows: int = 1) -> FileEntry:
    """The entry for a certificate of a file of so many rows, by its bytes."""
    return FileEntry(path=path, rows=rows, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def check_files(folder: str, entries: Iterable[FileEntry]) -> None:
    """Refuse files that are not the ones that were certified: each is read through once a process.

    Every reader of a certified output calls this before it opens a file; `VIMI_TRUST=1` skips it.

    Raises:
        DataError: a file is missing, truncated or changed.
    """
    if is_trusted():
        return
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: _check_file(join(absolute(folder), entry.path), entry), entries))


def is_trusted() -> bool:
    """Whether the user asked for no comparisons of files with what they should be."""
    return os.environ.get(TRUST, "0") not in ("", "0")


def has_hash(place: str, sha256: str) -> bool:
    """Whether the file has this hash; it is read through once a process, and again when it has changed."""
    return _has_hash(place, sha256, _look(place))


def _look(place: str) -> pafs.FileInfo:
    fs, path = filesystem(place)
    return fs.get_file_info(path)


def _has_hash(place: str, sha256: str, info: pafs.FileInfo) -> bool:
    state = (sha256, info.size, info.mtime_ns)
    with _locks[place]:
        if _checked.get(place) != state and sha256_file(place) == sha256:
            _checked[place] = state
        return _checked.get(place) == state


def _check_file(place: str, entry: FileEntry) -> None:
    info = _look(place)
    if info.type != pafs.FileType.File:
        wrong = "is missing"
    elif info.size != entry.num_bytes or not _has_hash(place, entry.sha256, info):
        wrong = "is not the file that was certified: it was damaged or changed"
    else:
        return
    raise DataError(f"{place} {wrong}; cure: restore it, or delete its folder and make it again")


def check_certified(uri: str, *, must_list: bool = True) -> None:
    """`check_files` for one file by its place: its certificate lies beside it.

    Args:
        uri: of the file.
        must_list: False = it may also be a user's own file, which no certificate lists.

    Raises:
        DataError: it is missing, truncated or changed, or its certificate doesn't list it.
    """
    folder, _, name = absolute(uri).rpartition("/")
    info = _look(join(folder, CERTIFICATE))
    if info.type == pafs.FileType.NotFound:
        return  # nothing was promised
    state, listed = _listed.get(folder, (None, {}))
    if state != (info.size, info.mtime_ns):
        certificate = read_certificate(folder)
        listed = {entry.path: entry for entry in certificate.files} if certificate else {}
        _listed[folder] = (info.size, info.mtime_ns), listed
    if name not in listed:
        if not must_list:
            return
        raise DataError(f"{uri} is not in the certificate of its folder; cure: make that folder again")
    check_files(folder, [listed[name]])
