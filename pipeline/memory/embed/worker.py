"""The embedding worker: a slice of clips in, one staged Arrow file of documents and a receipt out."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from infra.certificate import Certificate
from infra.clip import ClipConfig
from infra.storage import join, write_bytes
from pipeline.journal import Receipt, Unit
from pipeline.memory.embed.pictures import KEY_FRAMES, Picture, Row, read_picture
from pipeline.memory.embed.streams import CPU_BATCH, GPU_BATCH, Streams, ahead, batches, settle_process
from pipeline.memory.store import arrow_bytes, id_filter, open_table
from pipeline.memory.vectors import document_vector, frame_mean, unit, vectors_arrow
from pipeline.schema import (
    CLIPS,
    MAX_CAPTION_CHARS,
    ORIGIN,
    RowError,
    Status,
    content_id,
    doc_id,
    memory_schema,
)
from pipeline.shards import read_slice

if TYPE_CHECKING:
    from infra.clip.model import Clip

COLUMNS = ["clip_id", "media", "caption", *ORIGIN, "local_uri", "phash", "status"]
COPIED = ["media", "source_uri", "source_sha256", "start_s", "end_s", "source_name", "licence", "split"]
Fate = tuple[Row, Status, str]


@dataclass(frozen=True)
class Embedder:
    """Makes the worker of `run_units`: loads the CLIP once, in the worker's own process."""

    clip: ClipConfig
    staged: str
    """Folder of the staged files."""
    key_frames: int = KEY_FRAMES
    base: str | None = None
    """A memory that grows: documents that it holds already are not embedded again."""
    base_version: str | None = None
    device: str = "cpu"
    threads: int = 2
    """Threads that decode and, on CPUs, hold a forward each; decoders release the interpreter."""

    def __call__(self) -> Callable[[dict[str, Any]], Receipt]:
        settle_process(self.device)
        clip = self.load()
        streams = Streams.make(self.device, self.threads)
        return lambda payload: self.run(payload, clip, streams)

    def load(self) -> "Clip":
        """The CLIP, with batches that suit the device."""
        from infra.clip import load_clip

        rows = GPU_BATCH if self.device != "cpu" else CPU_BATCH
        return load_clip(self.clip, self.device, batch_size=rows)

    def run(self, payload: dict[str, Any], clip: "Clip", streams: Streams) -> Receipt:
        """Embed the rows of a slice that the crawl found good; those that fail get a fate, never raise."""
        every = read_slice(payload["uri"], payload["start"], payload["rows"], COLUMNS).to_pylist()
        rows = [row for row in every if row["status"] == Status.OK]
        good, fates = self._sort(rows)
        texts = start_texts(clip, [row["caption"].strip() for row in good], streams)
        decoded = ahead(
            streams.decoders,
            lambda row: self._decode(row, clip),
            good,
            depth=2 * streams.num_decoders + clip.batch_size,
        )
        groups = batches(zip(range(len(good)), decoded, strict=True), clip.batch_size)
        embedded = ahead(
            streams.models, lambda group: image_vectors(clip, group), groups, depth=streams.num_models
        )
        found = [picture for group in embedded for picture in group]
        failed = {n: picture for n, picture, _ in found if isinstance(picture, RowError)}
        fates += [(good[n], error.status, str(error)) for n, error in failed.items()]
        documents = [(good[n], picture) for n, picture, _ in found if isinstance(picture, Picture)]
        kept = [n for n in range(len(good)) if n not in failed]
        vectors = [vector for _, _, vector in found if vector is not None]
        table = documents_table(documents, vectors, texts()[kept], clip.dim)
        model = {"model": clip.identity, "model_hash": clip.model_hash, "dim": clip.dim}
        return self._stage(table, len(rows), fates) | model

    def _decode(self, row: Row, clip: "Clip") -> Picture | RowError:
        try:
            return read_picture(row, clip.preprocessing, key_frames=self.key_frames)
        except RowError as error:
            return error
        except Exception as error:  # noqa: BLE001 - row boundary: decoders raise anything on bad bytes
            return RowError(Status.CRASHED, f"{type(error).__name__}: {error}")

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
        caption = (row["caption"] or "").strip()
        if not caption:
            return Status.FILTERED_NO_CAPTION, "no caption"
        if len(caption) > MAX_CAPTION_CHARS:
            return Status.BAD_CAPTION, f"caption of {len(caption):,} characters"
        return Status.OK, ""

    def _known(self, doc_ids: list[str]) -> set[str]:
        if self.base is None or not doc_ids:
            return set()
        table = open_table(self.base)
        if table is None:
            return set()
        table.checkout(self.base_version)
        found = table.search().where(id_filter(doc_ids)).select(["doc_id"]).limit(len(doc_ids))
        return set(found.to_arrow()["doc_id"].to_pylist())

    def _stage(self, table: pa.Table, rows: int, fates: list[Fate]) -> Receipt:
        data = arrow_bytes(table)
        digest = hashlib.sha256(data).hexdigest()
        name = f"{digest[:32]}.arrow"
        if len(table):
            write_bytes(join(self.staged, name), data)
        counts = Counter(status.value for _, status, _ in fates)
        return {
            "rows": rows,
            "documents": len(table),
            "file": name if len(table) else None,
            "sha256": digest,
            "fates": dict(sorted(counts.items())),
            "rejected": [
                [r["clip_id"], r["source_uri"], s.value, e[:500]]
                for r, s, e in fates
                if s is not Status.FILTERED_DUPLICATE
            ],
            "notes": {Status.OK.value: len(table), **counts},
        }


def clip_units(tables: Sequence[tuple[str, Certificate]], *, rows_per_unit: int, key: str) -> Iterator[Unit]:
    """Slices of `rows_per_unit` rows of the certified parts, in the order of tables and parts.

    Args:
        tables: (folder, its certificate).
        rows_per_unit: the most rows of a unit.
        key: hash of what else decides the result (model, sizes); part of the unit's id.
    """
    for uri, certificate in tables:
        for part in (f for f in certificate.files if f.path.endswith(".parquet")):
            for start in range(0, part.rows, rows_per_unit):
                rows = min(rows_per_unit, part.rows - start)
                yield Unit(
                    id=content_id("embed", key, part.sha256, start, rows),
                    payload={"uri": join(uri, part.path), "start": start, "rows": rows},
                )


def row_doc_id(row: Row) -> str:
    source = row["source_sha256"] or row["source_uri"]
    return doc_id(source, row["start_s"] or 0.0, row["end_s"] or 0.0, row["caption"].strip())


def image_vectors(
    clip: "Clip", group: list[tuple[int, Picture | RowError]]
) -> list[tuple[int, Picture | RowError, np.ndarray | None]]:
    """(number, picture, its unit vector) of each row of a batch; the pixels are let go."""
    pictures = [picture for _, picture in group if isinstance(picture, Picture)]
    if not pictures:
        return [(n, picture, None) for n, picture in group]
    frames = clip.encode_pixels(np.concatenate([picture.pixels for picture in pictures]))
    vectors = iter(frame_mean(frames, [len(picture.pixels) for picture in pictures]))
    return [
        (n, replace(p, pixels=np.empty(0)), next(vectors)) if isinstance(p, Picture) else (n, p, None)
        for n, p in group
    ]


def start_texts(clip: "Clip", texts: list[str], streams: Streams) -> Callable[[], np.ndarray]:
    """Embed all texts of a slice beside its pictures, short ones with short ones: no padding is computed.

    Returns:
        What waits for them: unit vectors, float32 `n d`.
    """
    ids, lengths = clip.tokenize(texts)  # here, not in the threads: tokenizers may not be shared
    order = np.argsort(-lengths.numpy(), kind="stable")
    parts = [order[start : start + clip.batch_size] for start in range(0, len(order), clip.batch_size)]
    running = [streams.models.submit(clip.encode_tokens, ids[part], lengths[part]) for part in parts]

    def wait() -> np.ndarray:
        out = np.empty((len(texts), clip.dim), np.float32)
        for part, future in zip(parts, running, strict=True):
            out[part] = future.result()
        return unit(out)

    return wait


def documents_table(
    documents: list[tuple[Row, Picture]], image: list[np.ndarray], text: np.ndarray, dim: int
) -> pa.Table:
    """The staged rows: documents with their unit vectors, `n d` each."""
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
    pictures = np.stack(image)
    vectors = {"image": pictures, "text": text, "document": document_vector(pictures, text)}
    columns |= {f"{name}_embedding": vectors_arrow(rows) for name, rows in vectors.items()}
    arrays = [
        c if isinstance(c := columns[field.name], pa.Array) else pa.array(c, field.type) for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


assert set(COLUMNS) <= set(CLIPS.names)
