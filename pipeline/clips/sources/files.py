"""Videos and pictures with captions beside them: in a folder, or in WebDataset archives.

In an archive, members that share a name up to its first dot are one sample. It is listed, not unpacked: a
sample's media is a range of the archive (pipeline/media/store.py).
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs

from infra.errors import ConfigError
from infra.storage import absolute, exists, filesystem, is_remote, read_bytes, size_bytes
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
from pipeline.media.store import file_uri, member_uri
from pipeline.schema import Status

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SIDECAR_BYTES = 16 << 20


class FolderReader(Reader):
    """Every media file below a folder, in name order; hidden files are none of our business.

    Links are followed, but each folder is visited once: one that leads back up lists nothing twice.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.root = require_path(config.path)
        try:
            self.files = dict(_files_below(self.root))
        except OSError as error:
            raise ConfigError(f"can't look through {self.root}: {error}", cure="mend its permissions") from None

    @classmethod
    def recognise(cls, path: str) -> SourceConfig | None:
        is_file = exists(path) and not is_folder(path)
        return None if is_file else SourceConfig(kind="folder", path=path)

    def items(self) -> Iterator[Item]:
        for relative in sorted(self.files):
            if is_media(relative):
                uri = file_uri(f"{self.root}/{relative}")
                yield Item(uri, media_of(relative), self._cuts(relative))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for relative, (size, mtime_ns) in sorted(self.files.items()):
            digest.update(f"{relative}\0{size}\0{mtime_ns}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def _cuts(self, relative: str) -> tuple[Cut, ...]:
        stem = relative[: -len(suffix_of(relative))]
        for suffix in SIDECAR_SUFFIXES:
            for name in (stem + suffix, relative + suffix):  # a.txt, or a.mp4.txt
                if name in self.files:
                    return self._sidecar(name)
        return (Cut(),)

    def _sidecar(self, name: str) -> tuple[Cut, ...]:
        try:
            if (self.files[name][0] or 0) > MAX_SIDECAR_BYTES:
                raise OSError(f"more than {MAX_SIDECAR_BYTES:,} bytes")
            return read_sidecar(name, read_bytes(f"{self.root}/{name}"))
        except (OSError, ValueError) as error:  # or its name is not UTF-8
            return (Cut(status=Status.BAD_CAPTION.value, error=f"sidecar: {error}"),)


def _files_below(root: str) -> Iterator[tuple[str, tuple[int | None, int | None]]]:
    """(path below the root, (size, time of change)) of each file that is not hidden."""
    if is_remote(root):
        fs, base = filesystem(root)
        for info in fs.get_file_info(pafs.FileSelector(base, recursive=True)):
            relative = info.path[len(base) :].lstrip("/")
            if info.type == pafs.FileType.File and "/." not in f"/{relative}":
                yield relative, (info.size, info.mtime_ns)
        return
    home, visited = os.path.realpath(root), set[str]()
    folders, links = [""], []
    while folders or links:
        folder = folders.pop() if folders else links.pop()  # a folder counts where it is, before its links
        place = os.path.realpath(f"{root}/{folder}")
        if place in visited or home.startswith(f"{place}/"):
            continue
        visited.add(place)
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name, reverse=True):
            relative = f"{folder}{entry.name}"
            if entry.name.startswith("."):
                continue
            kind = _kind(entry)
            if kind == "folder":
                (links if entry.is_symlink() else folders).append(f"{relative}/")
            elif kind == "file":
                yield relative, (entry.stat().st_size, entry.stat().st_mtime_ns)
            elif entry.is_symlink():  # it leads nowhere: a row that says so
                yield relative, (None, None)


def _kind(entry: os.DirEntry[str]) -> str | None:
    """What a link leads to, or the entry is; None for anything else, and for a link in a ring."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError:
        return None


class TarReader(Reader):
    """One archive, a folder of them, or a brace range such as `{000..012}`."""

    def __init__(self, config: SourceConfig) -> None:
        path = config.path
        names = list(_braces(path))
        if names == [path]:
            require_path(path)
        if len(names) == 1 and not path.endswith(".tar"):
            root = absolute(path)
            names = [f"{root}/{name}" for name in sorted(dict(_files_below(root))) if name.endswith(".tar")]
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
            except Exception as error:  # noqa: BLE001 - the row boundary: on hostile headers tarfile raises anything
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
