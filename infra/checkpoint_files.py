"""torch's checkpoint files on any filesystem of pyarrow, and an index reader that runs no code."""

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemBase,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from infra.errors import TrainingError
from infra.storage import delete, exists, filesystem, is_remote, join


class ArrowFileSystem(FileSystemBase):
    """torch's checkpoint files on any filesystem of pyarrow."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        fs, place = filesystem(str(path))
        if "r" in mode:
            with fs.open_input_file(place) as stream:
                yield stream
        else:
            fs.create_dir(place.rpartition("/")[0], recursive=True)
            with fs.open_output_stream(place) as stream:
                yield stream

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return join(str(path), suffix)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        fs, source = filesystem(str(path))
        fs.move(source, filesystem(str(new_path))[1])

    def init_path(self, path: str | os.PathLike) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        fs, place = filesystem(str(path))
        fs.create_dir(place, recursive=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def exists(self, path: str | os.PathLike) -> bool:
        return exists(str(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        delete(str(path))


def _files_of(uri: str) -> FileSystemBase:
    return ArrowFileSystem() if is_remote(uri) else FileSystem()


def files_writer(uri: str) -> FileSystemWriter:
    writer: Any = FileSystemWriter(uri, sync_files=not is_remote(uri))
    writer.fs = _files_of(uri)
    writer.path = writer.fs.init_path(uri)
    return writer


class SafeReader(FileSystemReader):
    """torch's reader; the pickled index may name tensor types and nothing else."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.fs: Any = _files_of(uri)
        self.path = self.fs.init_path(uri)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(), "rb") as stream:
            metadata = _IndexUnpickler(io.BytesIO(stream.read())).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise TrainingError(f"checkpoint index names {module}.{name}: not a checkpoint of ours")
        return super().find_class(module, name)
