"""The embedding worker: a slice of clips in, one staged Arrow file of documents and a receipt out."""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from infra.clip.config import ClipConfig
from infra.storage import join, write_bytes
from pipeline.embed.pictures import EmbedConfig, Picture, PictureError, Row, read_picture
from pipeline.embed.units import payload_slice
from pipeline.job import Receipt
from pipeline.memory.store import open_table, vectors_arrow
from pipeline.schema import CLIPS, Status, doc_id, memory_schema

if TYPE_CHECKING:
    from infra.clip.model import Clip

COLUMNS = [
    "clip_id",
    "media",
    "caption",
    "source_uri",
    "source_sha256",
    "start_s",
    "end_s",
    "width_px",
    "height_px",
    "source_name",
    "licence",
    "split",
    "local_uri",
    "phash",
    "status",
    "error",
]
COPIED = ["media", "source_uri", "source_sha256", "start_s", "end_s", "source_name", "licence", "split"]
Fate = tuple[Row, Status, str]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Embedder:
    """Makes the worker of `run_units`: loads the CLIP once, in the worker's own process."""

    clip: ClipConfig
    embed: EmbedConfig
    staged: str
    """Folder of the staged files."""
    base: str | None = None
    """A memory that grows: documents that it holds already are not embedded again."""
    base_version: str | None = None
    device: str = "cpu"
    threads: int = 2
    """Decoding threads; FFmpeg and Pillow release the interpreter while they decode."""

    def __call__(self) -> Callable[[dict[str, Any]], Receipt]:
        from infra.clip import load_clip

        clip = load_clip(self.clip, self.device)
        pool = ThreadPoolExecutor(self.threads)
        return lambda payload: self.run(payload, clip, pool)

    def run(self, payload: dict[str, Any], clip: "Clip", pool: ThreadPoolExecutor) -> Receipt:
        """Embed one slice; bad rows get a fate, never raise."""
        rows = payload_slice(payload, COLUMNS).to_pylist()
        good, fates = self._sort(rows)
        documents: list[tuple[Row, Picture]] = []
        vectors: list[dict[str, np.ndarray]] = []

        def decode(row: Row) -> Picture | PictureError:
            try:
                return read_picture(row, self.embed, clip.preprocessing)
            except PictureError as error:
                return error
            except Exception as error:  # noqa: BLE001 - row boundary: decoders raise anything on bad bytes
                return PictureError(Status.CRASHED, f"{type(error).__name__}: {error}")

        decoded = ahead(pool, decode, good, depth=2 * self.threads + self.clip.batch_size)
        for batch in batches(zip(good, decoded, strict=True), self.clip.batch_size):
            usable = [(row, found) for row, found in batch if isinstance(found, Picture)]
            fates += [(r, e.status, str(e)) for r, e in batch if isinstance(e, PictureError)]
            if usable:
                vectors.append(unit_vectors(clip, usable))
                documents += [(row, _without_pixels(picture)) for row, picture in usable]
        table = documents_table(documents, vectors, clip.dim)
        model = {"model": clip.identity, "model_hash": clip.model_hash, "dim": clip.dim}
        return self._stage(table, rows, fates) | model

    def _sort(self, rows: list[Row]) -> tuple[list[Row], list[Fate]]:
        """Rows that deserve decoding, and the fates of the others."""
        good, fates, seen = [], [], set()
        for row in rows:
            status, error = self._fate(row)
            if status is Status.OK:
                row["doc_id"] = row_doc_id(row)
                if row["doc_id"] in seen:
                    status, error = Status.FILTERED_DUPLICATE, "the same document twice"
                seen.add(row["doc_id"])
            good.append(row) if status is Status.OK else fates.append((row, status, error))
        known = self._known([row["doc_id"] for row in good])
        old = [row for row in good if row["doc_id"] in known]
        fates += [(row, Status.FILTERED_DUPLICATE, "already in the memory") for row in old]
        return [row for row in good if row["doc_id"] not in known], fates

    def _fate(self, row: Row) -> tuple[Status, str]:
        if row["status"] != Status.OK:
            return Status(row["status"]), row["error"] or ""
        caption = (row["caption"] or "").strip()
        if not caption:
            return Status.FILTERED_NO_CAPTION, "no caption"
        if len(caption) > self.embed.max_caption_chars:
            return Status.BAD_CAPTION, f"caption of {len(caption):,} characters"
        return Status.OK, ""

    def _known(self, doc_ids: list[str]) -> set[str]:
        if self.base is None or not doc_ids:
            return set()
        table = open_table(self.base)
        if table is None:
            return set()
        table.checkout(self.base_version)
        quoted = ", ".join(f"'{d}'" for d in doc_ids)
        found = table.search().where(f"doc_id IN ({quoted})").select(["doc_id"]).limit(len(doc_ids))
        return set(found.to_arrow()["doc_id"].to_pylist())

    def _stage(self, table: pa.Table, rows: list[Row], fates: list[Fate]) -> Receipt:
        data = arrow_bytes(table)
        digest = hashlib.sha256(data).hexdigest()
        name = f"{digest[:32]}.arrow"
        if len(table):
            write_bytes(join(self.staged, name), data)
        upstream = Counter(row["status"] for row in rows if row["status"] != Status.OK)
        ours = [(r, s, e) for r, s, e in fates if r["status"] == Status.OK]
        counts = upstream + Counter(status.value for _, status, _ in ours)
        return {
            "rows": len(rows),
            "rows_ok": len(rows) - sum(upstream.values()),
            "documents": len(table),
            "file": name if len(table) else None,
            "sha256": digest,
            "fates": dict(sorted(counts.items())),
            "rejected": [
                [r["clip_id"], r["source_uri"], s.value, e[:500]]
                for r, s, e in ours
                if s is not Status.FILTERED_DUPLICATE
            ],
            "notes": {"documents": len(table), **counts},
        }


def row_doc_id(row: Row) -> str:
    source = row["source_sha256"] or row["source_uri"]
    return doc_id(source, row["start_s"] or 0.0, row["end_s"] or 0.0, row["caption"].strip())


def unit_vectors(clip: "Clip", documents: list[tuple[Row, Picture]]) -> dict[str, np.ndarray]:
    """Unit vectors of a batch of documents: image, text and RA-CM3's document vector, float32 `n d`."""
    counts = [len(picture.pixels) for _, picture in documents]
    frames = clip.encode_pixels(np.concatenate([picture.pixels for _, picture in documents]))
    image = frame_mean(np.asarray(frames, np.float32), counts)
    texts = [row["caption"].strip() for row, _ in documents]
    text = unit_rows(np.asarray(clip.encode_texts(texts), np.float32))
    return {
        "image_embedding": image,
        "text_embedding": text,
        "document_embedding": document_vector(image, text),
    }


def frame_mean(frames: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Normalise, mean, normalise over each run of `counts` rows (RAGME): `sum(counts) d` -> `n d`."""
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(unit_rows(frames), starts, axis=0)
    return unit_rows(sums / np.asarray(counts, np.float32)[:, None])


def document_vector(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """RA-CM3 (arXiv 2211.12561): the normalised mean of the two unit vectors."""
    return unit_rows((image + text) / 2)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12)


def documents_table(
    documents: list[tuple[Row, Picture]], vectors: list[dict[str, np.ndarray]], dim: int
) -> pa.Table:
    schema = memory_schema(dim)
    if not documents:
        return schema.empty_table()
    columns: dict[str, Any] = {
        "doc_id": [row["doc_id"] for row, _ in documents],
        "text": [row["caption"].strip() for row, _ in documents],
        "image": [picture.jpeg for _, picture in documents],
        "phash": [picture.phash for _, picture in documents],
        "width_px": [row["width_px"] or picture.width_px for row, picture in documents],
        "height_px": [row["height_px"] or picture.height_px for row, picture in documents],
        **{name: [row[name] for row, _ in documents] for name in COPIED},
    }
    for name in ("image_embedding", "text_embedding", "document_embedding"):
        columns[name] = vectors_arrow(np.concatenate([batch[name] for batch in vectors]))
    arrays = [
        c if isinstance(c := columns[field.name], pa.Array) else pa.array(c, field.type) for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def arrow_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], *, depth: int
) -> Iterator[R]:
    """`map` in order on a pool, at most `depth` results ahead of the reader: memory stays bounded."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _without_pixels(picture: Picture) -> Picture:
    return Picture(np.empty(0), picture.jpeg, picture.phash, picture.width_px, picture.height_px)


assert set(COLUMNS) <= set(CLIPS.names)
