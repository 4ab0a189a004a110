"""Prompt shards that training reads, without the jobs that make them: real Parquet, JPEG, mp4."""

import hashlib
import io
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from infra.certificate import Certificate, write_certificate
from pipeline.schema import PROMPTS
from pipeline.shards import shard_name, write_meta, write_shard

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


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
        "source_sha256": None,
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
    starts = enumerate(range(0, len(rows), file_rows))
    files = [
        write_shard(str(folder / shard_name(n)), rows[at : at + file_rows], PROMPTS, row_group_rows=group_rows)
        for n, at in starts
    ]
    files.append(write_meta(str(folder), files, row_group_rows=group_rows))
    certificate = Certificate(job=job, config_hash="0" * 16, num_in=len(rows), num_out=len(rows), files=files)
    write_certificate(str(folder), certificate)
    return folder
