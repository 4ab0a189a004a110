"""A folder of videos and pictures with captions beside them, on disk or in an object store."""

import hashlib
from collections.abc import Iterator

import pyarrow.fs as pafs

from infra.storage import absolute, filesystem, read_bytes
from pipeline.clips.sources.base import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Cut,
    Item,
    media_of,
    suffix_of,
)
from pipeline.clips.sources.sidecars import SIDECAR_SUFFIXES, read_sidecar


class FolderReader:
    """Every media file below a folder, in name order; hidden files are none of our business."""

    def __init__(self, path: str) -> None:
        self.root = absolute(path)
        fs, base = filesystem(self.root)
        self.files: dict[str, pafs.FileInfo] = {}
        for info in fs.get_file_info(pafs.FileSelector(base, recursive=True)):
            relative = info.path[len(base) :].lstrip("/")
            if info.type == pafs.FileType.File and not _hidden(relative):
                self.files[relative] = info

    def items(self) -> Iterator[Item]:
        for relative in sorted(self.files):
            if suffix_of(relative) in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
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
