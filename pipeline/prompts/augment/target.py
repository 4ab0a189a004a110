"""Makes a clip's training target: frames at the training size, an mp4, or a reference to the source."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Resampling
from pydantic import Field, model_validator

from infra.config import Config
from infra.pictures import decode_picture
from pipeline.media.clip import cut_mp4
from pipeline.media.frames import clip_times, decode_frames
from pipeline.media.store import open_media, read_media, row_errors
from pipeline.prompts.guard import frame_hashes
from pipeline.schema import Media, TargetKind

Row = dict[str, Any]
GUARD_FRAMES = 16
"""Frames over the whole clip that the guard hashes, so that a trimmed or sped-up copy, which shows
another middle, is still known. Ours."""
CRF = 18
"""x264's constant rate factor where a `video` target has to be cut out of a longer file. Ours."""

MAX_BYTES = 1 << 28
"""Of one row's frames. Ours; row groups of a few rows stay below Arrow's 2 GB."""


class TargetConfig(Config):
    """What is stored for the generator to learn."""

    kind: TargetKind = TargetKind.FRAMES
    """frames = uint8 at the training size; video = encoded mp4; reference = path and times only: nothing
    is decoded, so the guard knows the clip by the crawl's hash of its middle frame alone."""
    num_frames: int = Field(default=16, ge=1, le=1024)
    """Frames of a video target. Snap Video and VIMI's samples: 16. Pictures always have 1."""
    height_px: int = Field(default=36, ge=1, le=4096)
    """Height of the stored frames, pixels; Snap Video's base stage: 36 x 64."""
    width_px: int = Field(default=64, ge=1, le=4096)
    """Width of the stored frames, pixels."""
    fps: float | None = Field(default=6.0, gt=0, le=1000)
    """Frames per second of the stored frames, taken from the clip's middle (VIMI's samples: 6). A clip
    too short for that is spread over its whole length at a higher rate; None = always the whole clip."""

    @model_validator(mode="after")
    def _fits_a_row(self) -> "TargetConfig":
        size = 3 * self.num_frames * self.height_px * self.width_px
        if self.kind == TargetKind.FRAMES and size > MAX_BYTES:
            raise ValueError(
                f"frames of {size:,} bytes in a row; legal: up to {MAX_BYTES:,}, or kind video or reference"
            )
        return self


@dataclass(frozen=True)
class Target:
    """A target and what the guard can learn from its frames."""

    value: dict[str, Any]
    """As `schema.TARGET`."""
    phashes: tuple[int, ...] = ()
    """Perceptual hashes of frames over the whole clip, whole and cropped; see `guard.frame_hashes`."""


def make_target(row: Row, config: TargetConfig) -> Target:
    """The target of one clip or picture.

    Args:
        row: of a clips table: media, local_uri, source_uri, source_sha256, start_s, end_s, width_px, height_px.
        config: kind and size.

    Raises:
        RowError: the media can't be read or decoded any more.
    """
    if config.kind == TargetKind.REFERENCE:
        return Target({"kind": TargetKind.REFERENCE.value})
    place, sha256 = row["local_uri"] or row["source_uri"], row["source_sha256"]
    with row_errors():
        if row["media"] == Media.IMAGE:
            return _picture(read_media(place, sha256), config)
        if config.kind == TargetKind.VIDEO:
            return _video(row, open_media(place, sha256), config)
        return _frames(row, open_media(place, sha256), config)


def frame_times(start_s: float, end_s: float, config: TargetConfig) -> tuple[list[float], float]:
    """Times of the target's frames in seconds, and their rate in frames per second."""
    span_s = end_s - start_s
    if config.fps is not None and config.num_frames / config.fps < span_s:
        middle_s, half_s = (start_s + end_s) / 2, config.num_frames / config.fps / 2
        return clip_times(middle_s - half_s, middle_s + half_s, config.num_frames), config.fps
    return clip_times(start_s, end_s, config.num_frames), config.num_frames / max(span_s, 1e-3)


def covering_size(height_px: int, width_px: int, config: TargetConfig) -> tuple[int, int]:
    """(height, width) of the picture scaled, its shape kept, until it just covers the target."""
    scale = max(config.height_px / height_px, config.width_px / width_px)
    return (
        max(config.height_px, round(height_px * scale)),
        max(config.width_px, round(width_px * scale)),
    )


def centre_crop(frames: np.ndarray, config: TargetConfig) -> np.ndarray:
    """uint8 `t H W 3` -> its middle `t h w 3`."""
    top = (frames.shape[1] - config.height_px) // 2
    left = (frames.shape[2] - config.width_px) // 2
    return frames[:, top : top + config.height_px, left : left + config.width_px]


def _frames(row: Row, source: str | bytes, config: TargetConfig) -> Target:
    start_s, end_s = row["start_s"] or 0.0, row["end_s"] or 0.0
    times_s, rate = frame_times(start_s, end_s, config)
    size = covering_size(row["height_px"] or 1, row["width_px"] or 1, config)
    # One pass for both: frames to learn from, and frames over the whole clip for the guard to hash.
    looked_at = clip_times(start_s, end_s, GUARD_FRAMES)
    whole = decode_frames(source, [*times_s, *looked_at], size_px=(2 * size[0], 2 * size[1]))
    return _target(whole[: len(times_s)], whole[len(times_s) :], rate, config)


def _halved(frames: np.ndarray) -> np.ndarray:
    """uint8 `t 2h 2w 3` -> `t h w 3`, each pixel the mean of four."""
    count, height, width, _ = frames.shape
    cells = frames.reshape(count, height // 2, 2, width // 2, 2, 3).astype(np.uint16)
    return ((cells.sum(axis=(2, 4)) + 2) // 4).astype(np.uint8)


def _target(whole: np.ndarray, looked_at: np.ndarray, rate: float, config: TargetConfig) -> Target:
    """Of frames at twice the covering size: hashes need more pixels than the base stage does."""
    data = np.ascontiguousarray(centre_crop(_halved(whole), config))
    return Target(
        {
            "kind": TargetKind.FRAMES.value,
            "data": data.tobytes(),
            "num_frames": len(data),
            "height_px": config.height_px,
            "width_px": config.width_px,
            "fps": rate,
        },
        frame_hashes(looked_at),
    )


def _picture(data: bytes, config: TargetConfig) -> Target:
    """A picture is a video of one frame at an infinite frame rate (Snap Video, section 3.2)."""
    upright = decode_picture(data)
    size = covering_size(upright.height, upright.width, config)
    scaled = upright.resize((2 * size[1], 2 * size[0]), Resampling.BICUBIC, reducing_gap=3.0)
    frames = np.asarray(scaled)[None]
    return _target(frames, frames, math.inf, config)


def _video(row: Row, source: str | bytes, config: TargetConfig) -> Target:
    start_s, end_s = row["start_s"] or 0.0, row["end_s"] or 0.0
    target = cut_mp4(source, start_s, end_s, crf=CRF)
    size = covering_size(row["height_px"] or 1, row["width_px"] or 1, config)
    looked_at = decode_frames(
        source, clip_times(start_s, end_s, GUARD_FRAMES), size_px=(2 * size[0], 2 * size[1])
    )
    return Target(target, frame_hashes(looked_at))
