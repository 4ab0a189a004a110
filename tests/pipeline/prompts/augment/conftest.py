"""A small real world for augment: encoded videos, a certified clips table, a real LanceDB memory."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from infra.certificate import Certificate, FileEntry, write_certificate, write_sealed
from infra.claim import JOB_FILE
from infra.storage import sha256_file
from pipeline.media.frames import decode_frames
from pipeline.media.phash import phash64
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.vectors import vectors_arrow
from pipeline.schema import CLIPS, clip_id, content_id, memory_schema
from pipeline.shards import write_shard
from tests.pipeline.memory.memory_tables import make_memory

DIM = 64
NOUNS = ["man", "dog", "cat", "boat", "road", "guitar", "piano", "hill"]
WORDS = [*NOUNS, "a", "the", "on", "at", "rides", "runs", "jumps", "red", "blue", "slowly"]


@dataclass(frozen=True)
class World:
    """Where things lie."""

    clips: str
    memory: str
    rows: list[dict[str, Any]]
    write_clips: Callable[..., str]
    write_memory: Callable[..., str]


def caption(number: int) -> str:
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS, 7)) + f" take {number}"


def clip_rows(folder: Path, write_video: Callable[..., Path], videos: int, cuts: int) -> list[dict[str, Any]]:
    """`cuts` clips of one second out of each video, as crawl would list them."""
    rows = []
    for video in range(videos):
        path = write_video(folder / f"video-{video}.mp4", num_frames=10 * cuts, fps=10, seed=video)
        sha = sha256_file(str(path))
        for cut in range(cuts):
            text = caption(video * cuts + cut)
            frame = decode_frames(str(path), [cut + 0.5])[0]
            row: dict[str, Any] = dict.fromkeys(CLIPS.names) | {
                "clip_id": clip_id(sha, cut, cut + 1, text),
                "media": "video",
                "caption": text,
                "source_uri": str(path),
                "source_sha256": sha,
                "start_s": float(cut),
                "end_s": float(cut + 1),
                "width_px": 128,
                "height_px": 96,
                "source_name": "world",
                "local_uri": str(path),
                "fps": 10.0,
                "num_frames": 10,
                "phash": phash64(frame),
                "status": "ok",
            }
            rows.append(row)
    return rows


def write_clips(out: Path, rows: list[dict[str, Any]], part_rows: int = 7) -> str:
    """A certified clips table in parts, as crawl leaves it."""
    files: list[FileEntry] = []
    for start in range(0, max(len(rows), 1), part_rows):
        place = str(out / f"part-{start // part_rows:05d}.parquet")
        files.append(write_shard(place, rows[start : start + part_rows], CLIPS))
    good = sum(row["status"] == "ok" for row in rows)
    dead = {"undecodable": len(rows) - good} if good < len(rows) else {}
    certificate = Certificate(
        job="crawl", config_hash="x", num_in=len(rows), num_out=good, dead=dead, files=files
    )
    write_certificate(str(out), certificate)
    return str(out)


def jpeg(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).resize((128, 96)).save(sink, "JPEG", quality=80)
    return sink.getvalue()


def unit(seeds: list[int], salt: int, dim: int = DIM) -> np.ndarray:
    vectors = np.stack([np.random.default_rng([salt, seed]).normal(size=dim) for seed in seeds])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_memory(out: Path, rows: list[dict[str, Any]], *, shard_rows: int = 1000) -> str:
    """A certified memory that holds one document a row."""
    make_memory(str(out), document_rows(rows), shard_rows=shard_rows, model_hash="a model")
    write_sealed(str(out / JOB_FILE), {"config": {"clip": {"name": "offline"}}})
    return str(out)


def document_rows(rows: list[dict[str, Any]]) -> pa.Table:
    """Documents of these clips, with vectors that are drawn from the row's caption."""
    seeds = [int(content_id(row["caption"])[:8], 16) for row in rows]
    image = unit(seeds, 1)
    text = unit(seeds, 2)
    both = (image + text) / np.linalg.norm(image + text, axis=1, keepdims=True)
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in CLIPS.names}
    columns |= {
        "doc_id": [row_doc_id(row) for row in rows],
        "text": [row["caption"] for row in rows],
        "image": [jpeg(seed) for seed in seeds],
        "image_embedding": vectors_arrow(image),
        "text_embedding": vectors_arrow(text),
        "document_embedding": vectors_arrow(both),
    }
    schema = memory_schema(DIM)
    arrays = [
        columns[f.name] if isinstance(columns[f.name], pa.Array) else pa.array(columns[f.name], f.type)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> World:
    """24 clips of 8 videos, all of them documents of the memory; three more rows are bad."""
    folder = tmp_path_factory.mktemp("world")
    rows = clip_rows(folder / "videos", write_video, videos=8, cuts=3)
    bad = [
        row | {"clip_id": f"bad{n}", "status": "undecodable", "error": "bad", "caption": None}
        for n, row in enumerate(rows[:3])
    ]
    clips = write_clips(folder / "clips", [*rows[:10], *bad, *rows[10:]])
    return World(clips, write_memory(folder / "memory", rows), rows, write_clips, write_memory)
