"""Prompt shards for the trainer's tests: real Parquet, real JPEG and mp4, small moving squares."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.storage import Certificate, FileEntry, write_certificate
from pipeline.schema import PROMPTS

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
MakeShards = Callable[..., Path]


def moving_square(number: int, *, num_frames: int, height: int, width: int) -> np.ndarray:
    """uint8 `t h w 3`: a square of the row's colour that moves right."""
    colour = list(COLOURS.values())[number % len(COLOURS)]
    frames = np.full((num_frames, height, width, 3), 20 + number % 5, np.uint8)
    for t in range(num_frames):
        left = (number * 3 + t * 2) % (width - 6)
        frames[t, height // 3 : height // 3 + 6, left : left + 6] = colour
    return frames


def jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def mp4(frames: np.ndarray, fps: int = 8) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def prompt_row(
    number: int,
    *,
    kind: str = "frames",
    media: str = "video",
    task: str = "pretrain",
    num_frames: int = 8,
    height: int = 24,
    width: int = 40,
) -> dict[str, Any]:
    """One row of PROMPTS: a retrieved document, a caption, a moving square."""
    t = 1 if media == "image" else num_frames
    frames = moving_square(number, num_frames=t, height=height, width=width)
    name = list(COLOURS)[number % len(COLOURS)]
    document = {"doc_id": f"doc-{number % 7}", "retriever": "bm25", "rank": 1, "score": 1.0}
    segments = [
        {"type": "text", "role": "retrieved", "text": f"a {name} thing", "image": None, "document": document},
        {"type": "image", "role": "retrieved", "text": None, "image": jpeg(frames[0]), "document": document},
        {"type": "text", "role": "caption", "text": f"a {name} square moves to the right", "image": None},
    ]
    data = {"frames": frames.tobytes(), "video": None, "reference": None}[kind]
    if kind == "video":
        data = mp4(frames)
    prompt_id = hashlib.sha256(f"{number}{kind}{media}{task}".encode()).hexdigest()[:24]
    return {
        "prompt_id": prompt_id,
        "task": task,
        "clip_id": f"clip-{number:06d}",
        "media": media,
        "caption": segments[-1]["text"],
        "segments": segments,
        "num_documents": 1,
        "flags": [],
        "target": {
            "kind": kind,
            "data": data,
            "num_frames": t,
            "height_px": height,
            "width_px": width,
            "fps": float("inf") if media == "image" else 8.0,
        },
        "source_uri": f"/nowhere/{number}.mp4",
        "start_s": 0.0,
        "end_s": 0.0 if media == "image" else t / 8,
        "width_px": width,
        "height_px": height,
        "fps": None if media == "image" else 8.0,
        "memory_version": "test-1",
        "model_hash": "0" * 16,
        "config_hash": "0" * 16,
    }


def write_shards(
    folder: Path, rows: list[dict[str, Any]], *, job: str, group_rows: int, file_rows: int
) -> Path:
    """The layout of `vimi-data augment`: part files, meta.parquet, certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    files, meta = [], []
    for start in range(0, len(rows), file_rows):
        name = f"part-{len(files):05d}.parquet"
        table = pa.Table.from_pylist(rows[start : start + file_rows], schema=PROMPTS)
        pq.write_table(table, folder / name, row_group_size=group_rows)
        data = (folder / name).read_bytes()
        files.append(
            FileEntry(
                path=name,
                rows=len(table),
                num_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
        for group, first in enumerate(range(0, len(table), group_rows)):
            count = min(group_rows, len(table) - first)
            meta.append(
                {"file": name, "row_group": group, "num_rows": count, "first_row": start + first}
            )
    pq.write_table(pa.Table.from_pylist(meta), folder / "meta.parquet")
    certificate = Certificate(
        job=job, config_hash="0" * 16, num_in=len(rows), num_out=len(rows), files=files
    )
    write_certificate(str(folder), certificate)
    return folder


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """make_shards(num_rows=..., name=..., job=..., group_rows=..., **row options) -> folder."""

    def make(
        num_rows: int = 40,
        *,
        name: str = "prompts",
        job: str = "augment",
        group_rows: int = 4,
        file_rows: int = 16,
        rows: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> Path:
        rows = rows or [prompt_row(n, **options) for n in range(num_rows)]
        return write_shards(
            tmp_path / name, rows, job=job, group_rows=group_rows, file_rows=file_rows
        )

    return make


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    return prompt_row
