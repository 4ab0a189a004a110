"""Videos and pictures with captions beside them: in a folder, or in WebDataset archives.

In an archive, members that share a name up to its first dot are one sample. It is listed, not unpacked: a
sample's media is a range of the archive (pipeline/media/store.py).
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs

from infra.errors import ConfigError
from infra.storage import absolute, exists, filesystem, list_files, read_bytes, size_bytes
from pipeline.clips.sources.base import (
    Cut,
    Item,
    Reader,
    SourceConfig,
    is_folder,
    is_media,
    media_of,
    names_in,
    require_path,
    suffix_of,
)
from pipeline.clips.sources.captions import SIDECAR_SUFFIXES, read_sidecar
from pipeline.media.store import member_uri
from pipeline.schema import Status

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SIDECAR_BYTES = 16 << 20


class FolderReader(Reader):
    """Every media file below a folder, in name order; hidden files are none of our business."""

    def __init__(self, config: SourceConfig) -> None:
        self.root = require_path(config.path)
        fs, base = filesystem(self.root)
        self.files: dict[str, pafs.FileInfo] = {}
        for info in fs.get_file_info(pafs.FileSelector(base, recursive=True)):
            relative = info.path[len(base) :].lstrip("/")
            if info.type == pafs.FileType.File and not _hidden(relative):
                self.files[relative] = info

    @classmethod
    def recognise(cls, path: str) -> SourceConfig | None:
        is_file = exists(path) and not is_folder(path)
        return None if is_file else SourceConfig(kind="folder", path=path)

    def items(self) -> Iterator[Item]:
        for relative in sorted(self.files):
            if is_media(relative):
                uri = f"{self.root}/{relative}"
                yield Item(uri, media_of(relative), self._cuts(relative))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for relative, info in sorted(self.files.items()):
            digest.update(f"{relative}\0{info.size}\0{info.mtime_ns}\n".encode("utf-8", "replace"))
        return digest.hexdigest()[:16]

    def _cuts(self, relative: str) -> tuple[Cut, ...]:
        stem = relative[: -len(suffix_of(relative))]
        for suffix in SIDECAR_SUFFIXES:
            for name in (stem + suffix, relative + suffix):  # a.txt, or a.mp4.txt
                if name in self.files:
                    return read_sidecar(name, read_bytes(f"{self.root}/{name}"))
        return (Cut(),)


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


class TarReader(Reader):
    """One archive, a folder of them, or a brace range such as `{000..012}`."""

    def __init__(self, config: SourceConfig) -> None:
        path = config.path
        names = list(_braces(path))
        if names == [path]:
            require_path(path)
        if len(names) == 1 and not path.endswith(".tar"):
            names = list_files(path, suffix=".tar")
        if not names:
            raise ConfigError(f"no .tar below {path}", legal="uncompressed WebDataset archives")
        self.archives = [absolute(name) for name in names]

    @classmethod
    def recognise(cls, path: str) -> SourceConfig | None:
        names = [path] if suffix_of(path) == ".tar" else names_in(path)
        is_tar = names and all(suffix_of(name) == ".tar" for name in names)
        return SourceConfig(kind="tar", path=path) if is_tar else None

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
        if is_media(member.name):
            yield Item(member_uri(uri, member.offset_data, member.size), media_of(member.name), cuts)


def _braces(path: str) -> Iterator[str]:
    match = BRACES.search(path)
    if not match:
        yield path
        return
    low, high = match[1], match[2]
    for number in range(int(low), int(high) + 1):
        yield path[: match.start()] + f"{number:0{len(low)}d}" + path[match.end() :]
