"""Reads and writes files at local paths or pyarrow URIs (`s3://`, `gs://`, `file://`) by the same calls.

A write is whole or absent: local files are written beside their name and renamed, object stores put
atomically. `Certificate` is the JSON that says that a job's output is whole; it is written last.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from pydantic import BaseModel, ConfigDict, Field

from infra.errors import ConfigError, DataError

CERTIFICATE = "certificate.json"
VERSION = "0.1.0"


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
        target = Path(path)
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
        return
    fs.create_dir(path.rpartition("/")[0], recursive=True)
    with fs.open_output_stream(path, compression=None) as stream:
        stream.write(data)


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


def sha256_file(uri: str, *, chunk_bytes: int = 1 << 20) -> str:
    """Hex sha256 of a file's bytes, read in bounded chunks."""
    digest = hashlib.sha256()
    for chunk in stream_bytes(uri, chunk_bytes=chunk_bytes):
        digest.update(chunk)
    return digest.hexdigest()


def stream_bytes(uri: str, *, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
    fs, path = filesystem(uri)
    with fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(chunk_bytes):
            yield chunk


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


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


def write_certificate(uri: str, certificate: Certificate) -> None:
    """Check the conservation law, then certify; call it last."""
    certificate.check()
    write_json(join(uri, CERTIFICATE), certificate.model_dump(mode="json"))


def read_certificate(uri: str | Path, *, job: str | None = None) -> Certificate | None:
    """The certificate of the output at `uri`; None when there is none.

    Raises:
        DataError: not a certificate, or that of another job.
    """
    place = join(absolute(uri), CERTIFICATE)
    if not exists(place):
        return None
    try:
        certificate = Certificate.model_validate(read_json(place))
    except ValueError as error:
        raise DataError(f"{place} is not a certificate: {str(error).splitlines()[0]}") from None
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
