"""WebDataset archives: members that share a name up to its first dot are one sample.

The archive is listed, not unpacked: a sample's media is a range of the archive (pipeline/media/store.py).
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from typing import Any

from infra.errors import ConfigError
from infra.storage import absolute, filesystem, list_files, size_bytes
from pipeline.clips.sources.base import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Cut, Item, media_of, suffix_of
from pipeline.clips.sources.sidecars import SIDECAR_SUFFIXES, read_sidecar
from pipeline.media.store import member_uri
from pipeline.schema import Status

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SIDECAR_BYTES = 16 << 20


class TarReader:
    """One archive, a folder of them, or a brace range such as `{000..012}`."""

    def __init__(self, path: str) -> None:
        names = list(_braces(path))
        if len(names) == 1 and not path.endswith(".tar"):
            names = list_files(path, suffix=".tar")
        if not names:
            raise ConfigError(f"no .tar below {path}", legal="uncompressed WebDataset archives")
        self.archives = [absolute(name) for name in names]

    def items(self) -> Iterator[Item]:
        for uri in self.archives:
            fs, path = filesystem(uri)
            try:
                with fs.open_input_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                    yield from _samples(uri, archive)
            except (tarfile.TarError, OSError, EOFError) as error:
                yield Item(uri, "auto", status=Status.BAD_ROW.value, error=f"archive: {error}")

    def fingerprint(self) -> str:
        text = "\n".join(f"{uri}\0{size_bytes(uri)}" for uri in self.archives)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _samples(uri: str, archive: tarfile.TarFile) -> Iterator[Item]:
    key, members = None, []
    for member in archive:
        if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
            continue
        folder, slash, name = member.name.rpartition("/")
        stem = folder + slash + name.partition(".")[0]
        if stem != key and members:
            yield from _sample(uri, archive, members)
            members = []
        key = stem
        members.append(member)
    if members:
        yield from _sample(uri, archive, members)


def _sample(uri: str, archive: tarfile.TarFile, members: list[Any]) -> Iterator[Item]:
    cuts: tuple[Cut, ...] = (Cut(),)
    for suffix in reversed(SIDECAR_SUFFIXES):  # .txt wins over .json, as WebDataset writers put both
        sidecar = next((m for m in members if suffix_of(m.name) == suffix), None)
        if sidecar is not None and sidecar.size <= MAX_SIDECAR_BYTES:
            file = archive.extractfile(sidecar)
            found = read_sidecar(sidecar.name, file.read() if file else b"")
            cuts = found if any(cut.caption or cut.status for cut in found) else cuts
    for member in members:
        if suffix_of(member.name) in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            yield Item(member_uri(uri, member.offset_data, member.size), media_of(member.name), cuts)


def _braces(path: str) -> Iterator[str]:
    match = BRACES.search(path)
    if not match:
        yield path
        return
    low, high = match[1], match[2]
    for number in range(int(low), int(high) + 1):
        yield path[: match.start()] + f"{number:0{len(low)}d}" + path[match.end() :]
