"""Content-addressed store of fetched bytes, and what is known of each address for the next crawl.

media/ab/abcdef....mp4      the bytes, named by their sha256
media/urls/12/12ab....json  address -> sha256, size, ETag, Last-Modified
media/partial/12ab....      a download that was cut short, and its validator
"""

import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.storage import absolute, exists, is_remote, join, read_json, write_bytes
from pipeline.clips.sources.base import without_credentials
from pipeline.media.store import image_kind


@dataclass(frozen=True)
class Record:
    """What is known of one address."""

    url: str
    local_uri: str
    sha256: str
    num_bytes: int
    etag: str | None
    last_modified: str | None

    def found(self) -> dict[str, Any]:
        values = {"local_uri": self.local_uri, "etag": self.etag, "last_modified": self.last_modified}
        return {key: value for key, value in values.items() if value is not None}


class MediaStore:
    """One folder, shared by all workers: names are content hashes and writes are renames."""

    def __init__(self, folder: str) -> None:
        self.folder = absolute(folder)
        self.private = tempfile.TemporaryDirectory(prefix="vimi-") if is_remote(self.folder) else None
        self.parts = Path(self.private.name if self.private else self.folder) / "partial"

    def known(self, url: str) -> Record | None:
        """The record of an address that was fetched before, if its bytes are still there."""
        place = self._record_uri(url)
        if not exists(place):
            return None
        try:
            record = Record(**read_json(place))
        except (ValueError, TypeError):
            return None
        return record if exists(record.local_uri) else None

    @contextmanager
    def partial(self, url: str) -> Iterator[Path]:
        """Where a download of `url` grows; held by one process at a time, kept if it is cut short.

        Who finds it held gets a file of its own, from the start: no waiting, no mixing.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        part = self.parts / _key(url)
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(open_own(part, "ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = part.exists() and os.fstat(lock.fileno()).st_ino == part.stat().st_ino
            except OSError:  # held by another, or a link that somebody put there
                held = False
            if not held:
                part = part.with_name(f"{part.name}-{secrets.token_hex(8)}")
            try:
                yield part
            finally:
                if not held or (part.exists() and not part.stat().st_size):
                    part.unlink(missing_ok=True)
                    part.with_suffix(".validator").unlink(missing_ok=True)

    def close(self) -> None:
        if self.private is not None:
            self.private.cleanup()

    def commit(self, url: str, part: Path, *, etag: str | None, last_modified: str | None) -> Record:
        """Name a finished download by its content and remember its address."""
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            suffix = _suffix(file.read(64))
        size = part.stat().st_size
        uri = join(self.folder, digest[:2], digest + suffix)
        if is_remote(self.folder):
            write_bytes(uri, part.read_bytes())
            part.unlink()
        else:
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            part.replace(uri)
        part.with_suffix(".validator").unlink(missing_ok=True)
        record = Record(without_credentials(url), uri, digest, size, etag, last_modified)
        self._write_record(url, record)
        return record

    def _write_record(self, url: str, record: Record) -> None:
        # A lost record costs one download.
        write_bytes(self._record_uri(url), json.dumps(asdict(record)).encode(), synced=False)

    def _record_uri(self, url: str) -> str:
        key = _key(url)
        return join(self.folder, "urls", key[:2], f"{key}.json")


def open_own(path: Path, mode: str) -> Any:
    """Open a file of our own by a name that others could foresee: a link there is an error, not followed."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def read_validator(part: Path) -> str | None:
    """The validator of the part that is there already."""
    try:
        with open_own(part.with_suffix(".validator"), "r") as file:
            return file.read() or None
    except (OSError, ValueError):
        return None


def note_validator(part: Path, validator: str | None) -> None:
    note = part.with_suffix(".validator")
    note.unlink(missing_ok=True)
    if validator:
        with open_own(note, "x") as file:
            file.write(validator)


def _key(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _suffix(head: bytes) -> str:
    kind = image_kind(head)
    if kind:
        return ".jpg" if kind == "jpeg" else f".{kind}"
    if head[4:8] == b"ftyp":
        return ".mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return ".mkv"
    return ".bin"
