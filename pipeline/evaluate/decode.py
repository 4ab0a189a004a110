"""The frames of a video that are scored: its first ones, at its own rate or at a given one."""

from typing import Any

import numpy as np
from pydantic import Field

from infra.config import Config
from pipeline.media.frames import Source, decode_frames, opened, probe, to_rgb
from pipeline.media.store import open_media, row_errors
from pipeline.schema import RowError, Status


class FrameConfig(Config):
    """Which frames of each video are scored, of both sides alike."""

    num_frames: int = Field(default=16, ge=1, le=4096)
    """Frames of a video; one that has fewer fails. FVD is mostly of 16; I3D needs 9."""
    fps: float | None = Field(default=None, gt=0, le=1000)
    """Frames a second: those on screen at these times; null = the video's own frames, one after the other."""
    stride: int = Field(default=1, ge=1, le=1000)
    """Every how many-th of them."""


def frames_of(
    place: str | bytes, num_frames: int, fps: float | None, stride: int, start_s: float, end_s: float | None
) -> np.ndarray:
    """What `leading_frames` gives of bytes, or of those at a `local_uri`; called in a process that may die.

    Raises:
        RowError: the bytes can't be had, are no video, or hold too few frames.
    """
    with row_errors():
        source = open_media(place) if isinstance(place, str) else place
        return leading_frames(source, num_frames, fps=fps, stride=stride, start_s=start_s, end_s=end_s)


def leading_frames(
    source: Source,
    num_frames: int,
    *,
    fps: float | None = None,
    stride: int = 1,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> np.ndarray:
    """The first frames of a video or of a part of it, uint8 `t h w 3` at the display size.

    Raises:
        RowError: no video, damaged, or too few frames: too many are never made up.
    """
    if fps is None and not start_s and end_s is None:
        return _first_frames(source, num_frames, stride)
    info = probe(source)
    rate = (fps or info.fps) / stride
    times_s = [start_s + number / rate for number in range(num_frames)]
    end_s = info.duration_s if end_s is None else min(end_s, info.duration_s)
    if times_s[-1] > end_s - 0.5 / info.fps:
        raise too_short(int((end_s - start_s) * rate), num_frames)
    return decode_frames(source, times_s)


def _first_frames(source: Source, num_frames: int, stride: int) -> np.ndarray:
    """As they come out of the decoder: frames without a time count too."""
    found: list[np.ndarray] = []
    with opened(source) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number % stride == 0:
                size = found[0].shape[:2] if found else None  # a picture whose size changes is scaled back
                found.append(to_rgb(frame, stream, size))
            if len(found) == num_frames:
                return np.stack(found)
    raise too_short(len(found), num_frames)


def too_short(found: int, wanted: int) -> RowError:
    return RowError(Status.FILTERED_TOO_SHORT, f"{found} frames, {wanted} are scored")


def target_part(frames: np.ndarray, own_fps: float, how: FrameConfig) -> np.ndarray:
    """The same of frames that are decoded already, uint8 `t h w 3`."""
    step = how.stride if how.fps is None else how.stride * own_fps / how.fps
    places = [int(number * step + 1e-6) for number in range(how.num_frames)]
    if places[-1] >= len(frames):
        raise too_short(sum(place < len(frames) for place in places), how.num_frames)
    return frames[places]


def shrunk(frames: np.ndarray, scale: int) -> np.ndarray:
    """Frames uint8 `t h w 3` at the size that they were made at, of a file that shows each pixel `scale` times.

    Real videos are scored at their own size: enlarged ones would differ from them even where they are equal.
    """
    if scale == 1:
        return frames
    missing = [(0, -side % scale) for side in frames.shape[1:3]]  # a file's sides are even
    whole = np.pad(frames, ((0, 0), *missing, (0, 0)), mode="edge")
    height, width = (side // scale for side in whole.shape[1:3])
    cells = whole.reshape(len(whole), height, scale, width, scale, 3)
    return np.rint(cells.mean(axis=(2, 4))).astype(np.uint8)


def arguments(how: FrameConfig, payload: dict[str, Any]) -> tuple[Any, ...]:
    """Of `frames_of`, for a unit."""
    return payload["uri"], how.num_frames, how.fps, how.stride, payload["start_s"], payload["end_s"]
