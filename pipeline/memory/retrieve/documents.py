"""The memory's light columns as arrays, made once per machine and shared by its workers.

A worker needs every document's text statistics, vectors and origin, but only the chosen documents'
pictures. The first process writes the arrays to a folder, whole; the others map them into memory, so
that eight workers cost the pages of one.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc

from infra.certificate import (
    CERTIFICATE,
    Certificate,
    check_files,
    file_entries,
    read_certificate,
    write_certificate,
)
from infra.errors import DataError
from infra.storage import full_disk_told, list_files, user_cache
from pipeline.memory import Memory
from pipeline.memory.retrieve.analysis import Analysis
from pipeline.memory.retrieve.bm25 import Bm25
from pipeline.memory.store import EMBEDDINGS
from pipeline.schema import content_id

LIGHT = ("doc_id", "text", "media", "source_uri", "source_sha256", "start_s", "end_s", "split", "phash")
LAYOUT = 3  # change it when the files below change
CACHE_JOB = "arrays"
KEPT = 8  # memory versions whose arrays stay on this machine


@dataclass(frozen=True)
class Documents:
    """All documents of one memory version, in doc_id order: the number of a document is its place."""

    table: pa.Table
    """The columns `LIGHT`."""
    ids: np.ndarray
    """bytes [n], ascending."""
    image: np.ndarray
    """float16 [n d] unit picture vectors; zero rows = none. Likewise `text` and `document`."""
    text: np.ndarray
    document: np.ndarray
    bm25: Bm25

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, doc_ids: Sequence[str] | np.ndarray) -> np.ndarray:
        """int64 place of each id, -1 where the memory has no such document."""
        wanted = np.array(doc_ids, dtype="S24")
        if not len(self.ids):
            return np.full(len(wanted), -1)
        places = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        return np.where(self.ids[places] == wanted, places, -1)


def cache_folder(memory: Memory, analysis: Analysis = "english") -> Path:
    """Where this machine keeps the arrays of this memory version, for this user alone."""
    name = content_id("documents", LAYOUT, memory.uri, memory.version, memory.model_hash, analysis)
    return user_cache() / "documents" / name


def load_documents(memory: Memory, analysis: Analysis = "english") -> Documents:
    """The memory's arrays, from this machine's cache; made when they are not there or not whole."""
    folder = cache_folder(memory, analysis)
    if not _is_whole(folder):
        with full_disk_told(folder.parent):
            _make(memory, analysis, folder)
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    with pa.memory_map(str(folder / "light.arrow")) as source:
        table = ipc.open_file(source).read_all()
    names = ("ids", *EMBEDDINGS)
    image, text, document = (arrays[name] for name in EMBEDDINGS)
    index = {name: array for name, array in arrays.items() if name not in names}
    bm25 = Bm25(**index, num_documents=len(arrays["ids"]), analysis=analysis)
    return Documents(table, np.asarray(arrays["ids"]), image, text, document, bm25)


def _is_whole(folder: Path) -> bool:
    """Is each file there as it was made? What is not goes: it is made again."""
    try:
        certificate = read_certificate(folder, job=CACHE_JOB)
        check_files(str(folder), certificate.files if certificate else ())
    except DataError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return certificate is not None


def _make(memory: Memory, analysis: Analysis, folder: Path) -> None:
    """Write the arrays beside `folder` and rename: two processes may race, either result is whole."""
    folder.parent.mkdir(exist_ok=True, mode=0o700)
    staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        table = memory.columns_arrow(list(LIGHT)).combine_chunks()
        with pa.OSFile(str(staged / "light.arrow"), "wb") as sink, ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        ids = np.array(table["doc_id"].to_pylist(), dtype="S24")
        np.save(staged / "ids.npy", ids)
        for column in EMBEDDINGS:
            _save_vectors(memory, column, ids, staged / f"{column}.npy")
        bm25 = Bm25.build(pc.fill_null(table["text"], "").to_pylist(), analysis)
        for name, array in bm25.arrays().items():
            np.save(staged / f"{name}.npy", array)
        files = file_entries(str(staged), list_files(str(staged)))
        rows = len(ids)
        write_certificate(
            staged,
            Certificate(job=CACHE_JOB, config_hash=memory.version, num_in=rows, num_out=rows, files=files),
        )
        staged.replace(folder)
        _prune(folder.parent)
    except OSError:
        if not (folder / CERTIFICATE).exists():
            raise  # not lost to another process
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _prune(base: Path) -> None:
    """Keep the newest few; a process that has an older one mapped keeps it until it ends."""
    made = sorted(base.glob(f"*/{CERTIFICATE}"), key=lambda file: file.stat().st_mtime)
    for file in made[:-KEPT]:
        shutil.rmtree(file.parent, ignore_errors=True)


def _save_vectors(memory: Memory, column: str, ids: np.ndarray, path: Path) -> None:
    shape = (len(ids), memory.dim)
    if not len(ids):
        np.save(path, np.zeros(shape, np.float16))
        return
    target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    for doc_ids, vectors in memory.vectors(column):
        target[np.searchsorted(ids, np.array(doc_ids.to_pylist(), dtype="S24"))] = vectors
    target.flush()
