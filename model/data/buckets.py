"""Assigns rows to buckets by medium, aspect ratio, size and length, and splits off the validation rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.splits import is_held_out

KEY_COLUMNS = [
    *("media", "task", "height_px", "width_px", "source_sha256", "source_uri", "split"),
    *("start_s", "end_s", "fps", "target.num_frames"),
]
"""The cheap columns that decide which stream a row belongs to."""
VALIDATION = "validation "
"""In front of the task in the stream of rows that are kept from training."""


@dataclass(frozen=True)
class Bucket:
    """One shape of a micro-batch: every sample in it has the same medium, frames and size."""

    media: str
    num_frames: int
    height_px: int
    width_px: int
    fps: float | None = None
    """Frames a second that are wanted of a clip; None = they are spread over it."""

    @property
    def name(self) -> str:
        rate = f" at {self.fps:g} fps" if self.fps else ""
        return f"{self.media} {self.num_frames}x{self.height_px}x{self.width_px}{rate}"


def streams_of(
    keys: pa.Table, buckets: tuple[Bucket, ...], held_out_frac: float = 0.0
) -> list[tuple[int, str] | None]:
    """(bucket, task) of each row, from KEY_COLUMNS: the bucket of its medium with the nearest shape.

    None for a row whose medium no bucket takes; (bucket, VALIDATION + task) for one that is held out.
    """
    nearest: dict[tuple[Any, ...], int | None] = {}
    streams: list[tuple[int, str] | None] = []
    names = ("media", "task", "height_px", "width_px", "source_sha256", "source_uri", "split")
    columns = [keys[name].to_pylist() for name in names]
    for *row, num_frames in zip(*columns, frames_of(keys, buckets), strict=True):
        media, task, height, width, sha256, uri, split = row
        shape = (media, height, width, num_frames)
        if shape not in nearest:
            nearest[shape] = nearest_bucket(media, height, width, buckets, num_frames=num_frames)
        bucket = nearest[shape]
        kept_back = is_held_out(sha256 or uri or "", split, held_out_frac)
        streams.append(None if bucket is None else (bucket, VALIDATION + task if kept_back else task))
    return streams


def frames_of(keys: pa.Table, buckets: tuple[Bucket, ...]) -> list[int | None]:
    """Frames that each row's target has; asked for only if some buckets differ in nothing else.

    A reference has no target of its own: then its clip's length and frame rate say. None = unknown.
    """
    if len({(b.media, b.height_px, b.width_px) for b in buckets}) == len(buckets):
        return [None] * len(keys)
    stored = pc.struct_field(keys["target"], "num_frames").to_pylist()  # pyright: ignore
    clips = zip(*(keys[name].to_pylist() for name in ("start_s", "end_s", "fps")), strict=True)
    return [have or frames_in_clip(*clip) for have, clip in zip(stored, clips, strict=True)]


def frames_in_clip(start_s: float | None, end_s: float | None, fps: float | None) -> int | None:
    return round(((end_s or 0.0) - (start_s or 0.0)) * fps) or None if fps else None


def nearest_bucket(
    media: str,
    height: int | None,
    width: int | None,
    buckets: tuple[Bucket, ...],
    *,
    num_frames: int | None = None,
) -> int | None:
    """The bucket whose aspect ratio is nearest; of equals, the one with most pixels not above ours, and of
    those the one with most frames not above ours.
    """
    candidates = [n for n, bucket in enumerate(buckets) if bucket.media == media]
    if not candidates:
        return None
    aspect = np.log((width or 1) / (height or 1))
    pixels = (width or 1) * (height or 1)

    def distance(n: int) -> tuple[float, bool, int, bool, int]:
        area, frames = buckets[n].width_px * buckets[n].height_px, buckets[n].num_frames
        off = abs(aspect - np.log(buckets[n].width_px / buckets[n].height_px))
        too_large, too_long = area > pixels, frames > (num_frames or frames)
        # Of buckets that are all too large (or too long) the smallest.
        return (
            round(float(off), 2),
            too_large,
            area if too_large else -area,
            too_long,
            frames if too_long else -frames,
        )

    return min(candidates, key=distance)
