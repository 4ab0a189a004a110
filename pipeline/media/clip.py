"""A clip taken out of its source: its frames, from wherever they can still be had, or an mp4 of its own."""

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from infra.pictures import decode_picture
from infra.videos import X264
from pipeline.media.frames import decode_frames, frame_from, probe
from pipeline.media.store import open_media, read_media, row_errors
from pipeline.schema import Media, RowError, Status, TargetKind


@dataclass(frozen=True)
class ClipFrames:
    """Frames at fixed places of one clip, uint8 `n h w 3`."""

    frames: np.ndarray
    from_target: bool
    """The source could not be read: these are the target's own frames, often small."""


def read_frames(row: dict[str, Any], fracs: tuple[float, ...], *, local_uri: str | None = None) -> ClipFrames:
    """The frames at `fracs` of the clip (0 = first, 1 = last).

    `local_uri` is where the source's bytes lie, if not at `source_uri`.

    Raises:
        RowError: neither the source nor the target gives a frame.
    """
    try:
        with row_errors():
            return ClipFrames(_from_source(row, fracs, local_uri or row["source_uri"]), from_target=False)
    except RowError:
        frames = _from_target(row["target"] or {}, fracs)
        if frames is None:
            raise
        return ClipFrames(frames, from_target=True)


def first_frame(row: dict[str, Any], *, local_uri: str | None = None) -> ClipFrames:
    """The target's first frame, from the source and so at its full size, cropped as the target is.

    Raises:
        RowError: neither the source nor the target gives a frame.
    """
    target = row["target"] or {}
    if target.get("kind") == TargetKind.REFERENCE and row["media"] != Media.IMAGE:
        with row_errors():  # training begins with the first frame of the span, not with what is on screen then
            source = open_media(local_uri or row["source_uri"], row["source_sha256"])
            return ClipFrames(frame_from(source, row["start_s"] or 0.0)[None], from_target=False)
    found = read_frames(row, (_first_frac(row, target),), local_uri=local_uri)
    if found.from_target:
        return ClipFrames(read_frames(row, (0.0,), local_uri=local_uri).frames, from_target=True)
    if target.get("height_px") and target.get("width_px"):
        return ClipFrames(_crop(found.frames, target["width_px"] / target["height_px"]), from_target=False)
    return found


def _first_frac(row: dict[str, Any], target: dict[str, Any]) -> float:
    """Where in the clip the target begins: stored frames are the middles of equal parts of its middle."""
    span_s = (row["end_s"] or 0.0) - (row["start_s"] or 0.0)
    frames, fps = target.get("num_frames"), target.get("fps")
    if target.get("kind") != TargetKind.FRAMES or not frames or not fps or span_s <= 0:
        return 0.0
    covered = min(frames / fps / span_s, 1.0)
    return 0.5 - covered / 2 + 0.5 * covered / frames


def _crop(frames: np.ndarray, aspect: float) -> np.ndarray:
    """The largest middle part of `n h w 3` with `aspect` = width / height."""
    height, width = frames.shape[1:3]
    wanted = (min(height, round(width / aspect)), min(width, round(height * aspect)))
    top, left = (height - wanted[0]) // 2, (width - wanted[1]) // 2
    return frames[:, top : top + max(wanted[0], 1), left : left + max(wanted[1], 1)]


def _from_source(row: dict[str, Any], fracs: tuple[float, ...], uri: str) -> np.ndarray:
    sha256 = row["source_sha256"]
    if row["media"] == Media.IMAGE:
        return np.stack([np.asarray(decode_picture(read_media(uri, sha256)))] * len(fracs))
    start_s, end_s = row["start_s"] or 0.0, row["end_s"] or 0.0
    return decode_frames(open_media(uri, sha256), [start_s + frac * (end_s - start_s) for frac in fracs])


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


def cut_mp4(source: str | bytes, start_s: float, end_s: float, *, crf: int) -> dict[str, Any]:
    """The stretch [start_s, end_s] of a source as an mp4, as `schema.TARGET`; the same bytes each time.

    Raises:
        RowError: the source can't be decoded.
    """
    info = probe(source)
    count = max(1, round((end_s - start_s) * info.fps))
    size = (info.height_px // 2 * 2 or 2, info.width_px // 2 * 2 or 2)  # 4:2:0 needs even sides
    times_s = [start_s + number / info.fps for number in range(count)]
    rate = Fraction(info.fps).limit_denominator(1001)
    sink = io.BytesIO()
    try:
        with av.open(sink, "w", format="mp4") as container:
            options = {"crf": str(crf), "preset": "veryfast", **X264}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for first in range(0, count, 32):  # frames of a long clip don't fit in memory at once
                for picture in decode_frames(source, times_s[first : first + 32], size_px=size):
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except FFmpegError as error:
        raise RowError(Status.UNDECODABLE, f"encoding: {error}") from error
    shape = {"num_frames": count, "height_px": size[0], "width_px": size[1], "fps": float(rate)}
    return {"kind": TargetKind.VIDEO.value, "data": sink.getvalue(), **shape}
