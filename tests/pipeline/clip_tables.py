"""Clips tables for tests of what comes after crawl: real pictures, certified parts."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra.certificate import Certificate, FileEntry, write_certificate
from infra.storage import sha256_file, size_bytes
from pipeline.schema import CLIPS, Status, clip_id


def picture(path: Path, seed: int, *, size_px: tuple[int, int] = (60, 80)) -> Path:
    """A picture of smooth random waves, (height, width); another seed, another picture."""
    height, width = size_px
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
    total = np.zeros((height, width, 3))
    for _ in range(6):
        fy, fx, phase = *random.normal(0, 3, 2), random.uniform(0, 6.3)
        total += np.cos(6.3 * (fy * y + fx * x) + phase)[..., None] * random.normal(0, 1, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(128 + 50 * total, 0, 255).astype(np.uint8)).save(path)
    return path


def clip_row(path: Path, caption: str | None, **values: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
    row: dict[str, Any] = dict.fromkeys(CLIPS.names)
    row |= {"media": "image", "start_s": 0.0, "end_s": 0.0, "status": Status.OK, "attempt": 1}
    row |= {"caption": caption, "source_uri": str(path), "local_uri": str(path), "source_sha256": sha256}
    row |= {"source_name": "waves", "split": "train", **values}
    row["clip_id"] = clip_id(sha256 or str(path), row["start_s"], row["end_s"], caption)
    return row


def write_clips(folder: Path, rows: list[dict[str, Any]], *, part_rows: int = 1000) -> str:
    """A certified clips folder, as crawl leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, start in enumerate(range(0, len(rows), part_rows)):
        path = folder / f"part-{number:05d}.parquet"
        part = rows[start : start + part_rows]
        pq.write_table(pa.Table.from_pylist(part, schema=CLIPS), path, row_group_size=7)
        uri = str(path)
        files.append(
            FileEntry(path=path.name, rows=len(part), num_bytes=size_bytes(uri), sha256=sha256_file(uri))
        )
    write_certificate(
        str(folder),
        Certificate(job="crawl", config_hash="0", num_in=len(rows), num_out=len(rows), files=files),
    )
    return str(folder)
