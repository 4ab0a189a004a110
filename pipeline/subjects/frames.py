"""Frames of a training clip, from wherever they can still be had: the source file, or the row's target."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from infra.storage import read_bytes
from pipeline.schema import Media, Status, TargetKind
from pipeline.video import VideoError, decode_frames, probe


@dataclass(frozen=True)
class ClipFrames:
    """Frames at fixed places of one clip, uint8 `n h w 3`."""

    frames: np.ndarray
    from_target: bool
    """The source could not be read: these are the target's own frames, often small."""


def read_frames(row: dict[str, Any], fracs: tuple[float, ...], *, local_uri: str | None = None) -> ClipFrames:
    """The frames at `fracs` of the clip (0 = first, 1 = last).

    Args:
        row: of `schema.PROMPTS`.
        fracs: places in the clip, shares of its length.
        local_uri: where the source's bytes lie, if not at `source_uri`.

    Raises:
        VideoError: neither the source nor the target gives a frame.
    """
    try:
        return ClipFrames(_from_source(row, fracs, local_uri or row["source_uri"]), from_target=False)
    except (VideoError, OSError) as error:
        frames = _from_target(row["target"] or {}, fracs)
        if frames is None:
            raise (
                error if isinstance(error, VideoError) else VideoError(Status.UNREACHABLE, str(error))
            ) from error
        return ClipFrames(frames, from_target=True)


def _from_source(row: dict[str, Any], fracs: tuple[float, ...], uri: str) -> np.ndarray:
    if row["media"] == Media.IMAGE:
        return np.stack([_picture(read_bytes(uri))] * len(fracs))
    start_s, end_s = row["start_s"] or 0.0, row["end_s"] or 0.0
    return decode_frames(uri, [start_s + frac * (end_s - start_s) for frac in fracs])


def _picture(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(Status.UNDECODABLE, f"picture: {error}") from error


def _from_target(target: dict[str, Any], fracs: tuple[float, ...]) -> np.ndarray | None:
    """Frames of the target that the row carries; None if it carries none."""
    data = target.get("data")
    if data is None:
        return None
    if target["kind"] == TargetKind.FRAMES:
        frames = target_frames(target)
        return frames[[round(frac * (len(frames) - 1)) for frac in fracs]]
    duration_s = probe(data).duration_s
    return decode_frames(data, [frac * duration_s for frac in fracs])


def target_frames(target: dict[str, Any]) -> np.ndarray:
    """The frames of a target of kind `frames`: uint8 `t h w 3`."""
    shape = (target["num_frames"], target["height_px"], target["width_px"], 3)
    return np.frombuffer(target["data"], np.uint8).reshape(shape)
