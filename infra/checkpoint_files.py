"""torch's checkpoint files on any filesystem of pyarrow, and an index reader that runs no code."""

import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import (
    FileSystemBase,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from infra.certificate import FileEntry
from infra.errors import TrainingError
from infra.storage import delete, exists, filesystem, is_remote, join, make_folder


class CheckpointFiles(FileSystemBase):
    """torch's checkpoint files on any filesystem of pyarrow; what is written is hashed on the way.

    Attributes:
        written: by name, what this process has written.
    """

    def __init__(self) -> None:
        self.written: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        fs, place = filesystem(str(path))
        if "r" in mode:
            with fs.open_input_file(place) as stream:
                yield stream
            return
        make_folder(str(path).rpartition("/")[0])
        # A local file is Python's own: torch asks for its number, to bring it to the disk.
        with fs.open_output_stream(place) if is_remote(str(path)) else open(place, "wb") as stream:  # noqa: PTH123
            hashed = HashedStream(stream)
            yield hashed
        name = place.rpartition("/")[2]
        self.written[name] = FileEntry(
            path=name, rows=0, num_bytes=hashed.num_bytes, sha256=hashed.sha256.hexdigest()
        )

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return join(str(path), suffix)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        fs, source = filesystem(str(path))
        target = filesystem(str(new_path))[1]
        fs.move(source, target)
        name = target.rpartition("/")[2]
        self.written[name] = self.written.pop(source.rpartition("/")[2]).model_copy(update={"path": name})

    def init_path(self, path: str | os.PathLike) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        make_folder(str(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def exists(self, path: str | os.PathLike) -> bool:
        return exists(str(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        delete(str(path))


class HashedStream:
    """A file that is written from its start to its end, with the hash of what was written."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.sha256, self.num_bytes = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> Any:
        self.sha256.update(data)
        self.num_bytes += memoryview(data).nbytes
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def files_writer(uri: str) -> tuple[FileSystemWriter, CheckpointFiles]:
    """Torch's writer, and what will have been written by it."""
    writer: Any = FileSystemWriter(uri, sync_files=not is_remote(uri))
    writer.fs = files = CheckpointFiles()
    writer.path = uri
    return writer, files


class SafeReader(FileSystemReader):
    """torch's reader; the pickled index may name tensor types and nothing else."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.fs: Any = CheckpointFiles()
        self.path: Any = uri

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
