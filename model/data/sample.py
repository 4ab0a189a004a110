"""Decodes a row of PROMPTS into a Sample: frames of the clip, resized and cropped to the bucket.

Targets come as raw frames (`frames`), as mp4 bytes (`video`) or as a range of a local file (`reference`).
"""

import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from infra.certificate import has_hash, is_trusted
from infra.errors import DataError
from infra.pictures import PictureError, decode_picture
from infra.storage import absolute, is_remote
from infra.videos import open_video
from model.condition import Prompt
from model.data.batch import Sample, TargetKind
from model.data.buckets import Bucket
from model.encodings.store import StoredRow


def read_sample(
    row: dict[str, Any], bucket: Bucket, *, position: int, prompt: Prompt, pixels: bool = True
) -> Sample:
    """Decode the row's target at the bucket's size.

    The row is of PROMPTS (`stored`, if there, holds its encodings), the prompt as it is after the choice of
    documents and the dropout. `pixels` False: the stored latents do, and nothing is decoded.

    Raises:
        DataError: a target that can't be read, or a row that could not be encoded; names the prompt.
    """
    stored: StoredRow | None = row.get("stored")
    encoded, latents = None, None
    if stored is not None:
        stored.check(row["prompt_id"])
        encoded, latents = stored.prompt(prompt), stored.latents(row, bucket)
    if stored is not None and not pixels:
        if latents is None:
            raise DataError(f"prompt {row['prompt_id']}: no latents of this target at {bucket.name}")
        frames, fps = np.empty(0, np.uint8), latents[1]
    else:
        frames, fps = read_pixels(row, bucket)
    target = row["target"]
    return Sample(
        position=position,
        prompt_id=row["prompt_id"],
        clip_id=row["clip_id"],
        task=row["task"],
        prompt=prompt,
        pixels=frames,
        fps=fps,
        original_size_px=(
            row["height_px"] or target["height_px"] or bucket.height_px,
            row["width_px"] or target["width_px"] or bucket.width_px,
        ),
        encoded=encoded,
        latents=None if latents is None else latents[0],
    )


def read_pixels(row: dict[str, Any], bucket: Bucket) -> tuple[np.ndarray, float]:
    """uint8 `t h w 3` target at the bucket's size, and its frame rate: inf for pictures.

    Raises:
        DataError: it can't be read; names the prompt.
    """
    try:
        frames, fps = read_target(row, bucket)
    except (OSError, ValueError, PictureError) as error:  # PyAV's errors are OSError or ValueError
        raise DataError(f"prompt {row['prompt_id']}: {type(error).__name__}: {error}") from None
    frames = fit_frames(frames, bucket.height_px, bucket.width_px)
    return frames, float("inf") if bucket.media == "image" else fps


def view_bytes(data: bytes | np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 array of this shape over the bytes, uncopied; it is not to be written to.

    Raises:
        ValueError: not as many bytes as wanted.
    """
    found, wanted = 0 if data is None else len(data), math.prod(shape)
    if data is None or found != wanted:
        raise ValueError(f"{found} bytes of frames, {wanted} expected")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_target(row: dict[str, Any], bucket: Bucket) -> tuple[np.ndarray, float]:
    """uint8 `t h w 3` frames, as many as the bucket has, and their frame rate."""
    target = row["target"]
    if target["kind"] == TargetKind.FRAMES:
        shape = (target["num_frames"], target["height_px"], target["width_px"], 3)
        frames = view_bytes(target["data"], shape)
        if len(frames) == bucket.num_frames:
            return frames, slower(target["fps"], len(frames), bucket.num_frames)
        keep = spread(len(frames), bucket.num_frames)
        return frames[keep], slower(target["fps"], len(frames), bucket.num_frames)
    if target["kind"] == TargetKind.VIDEO:
        return decode_video(io.BytesIO(target["data"]), bucket.num_frames, fps=bucket.fps)
    uri = row["source_uri"]
    if is_remote(uri):
        raise DataError(f"target of prompt {row['prompt_id']} is a reference to {uri}: not a local file")
    sha256 = row.get("source_sha256")
    if sha256 and not is_trusted() and not has_hash(absolute(uri), sha256):
        raise DataError(f"target of prompt {row['prompt_id']}: {uri} holds other bytes than the crawl found")
    if bucket.media == "image":
        return read_picture(absolute(uri), bucket.num_frames), 1.0
    return decode_video(
        f"file:{absolute(uri)}",  # ffmpeg would take "C:b.mp4" for a protocol
        bucket.num_frames,
        span_s=(row["start_s"] or 0.0, row["end_s"] or float("inf")),
        fps=bucket.fps,
    )


def read_picture(path: str, num_frames: int) -> np.ndarray:
    """uint8 `t h w 3`: the picture of a local file, upright, as often as wanted.

    Raises:
        PictureError: no picture of a format that is read here.
        OSError: no such file.
    """
    with Path(path).open("rb") as file:
        picture = np.asarray(decode_picture(file))
    return np.repeat(picture[None], num_frames, axis=0)


def decode_video(
    source: str | io.BytesIO,
    num_frames: int,
    *,
    span_s: tuple[float, float] | None = None,
    fps: float | None = None,
) -> tuple[np.ndarray, float]:
    """`num_frames` frames of a video (or of a span of it), and their frame rate.

    Without `fps` they are spread evenly over all of it. With it they begin at its start and follow at that
    rate, or at the video's own where that is slower; what is too short for so many is spread.

    Raises:
        ValueError: no container that is read here, or no frame could be decoded.
    """
    start_s, end_s = span_s or (0.0, float("inf"))
    wanted_s = (num_frames - 1) / fps if fps else float("inf")
    frames, times_s = [], []
    with open_video(source) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        stream.thread_count = 1  # the loader has threads of its own
        base, begin = stream.time_base or Fraction(1, 1000), stream.start_time or 0
        if start_s > 0:
            container.seek(int(start_s / base) + begin, stream=stream)
        for frame in container.decode(stream):
            pts = begin if frame.pts is None else frame.pts
            time_s = float((pts - begin) * base)  # spans count from the stream's first frame
            if time_s >= end_s - 1e-6 and frames:
                break
            if time_s >= start_s - 1e-6:
                frames.append(frame.to_ndarray(format="rgb24"))
                times_s.append(time_s)
                if len(frames) >= num_frames and time_s - times_s[0] >= wanted_s:
                    break
    if not frames:
        raise ValueError("no frame could be decoded")
    keep, rate = choose_frames(np.array(times_s), num_frames, fps)
    return np.stack([frames[n] for n in keep]), rate


def choose_frames(times_s: np.ndarray, num_frames: int, fps: float | None) -> tuple[np.ndarray, float]:
    """Indices of `num_frames` of the frames at `times_s`, as `decode_video` says, and their frame rate."""
    available, whole_s = len(times_s), float(times_s[-1] - times_s[0])
    own = (available - 1) / whole_s if whole_s > 0 else 1.0
    if fps and available >= num_frames:
        rate = min(fps, own)
        wanted_s = np.arange(num_frames) / rate
        if whole_s >= wanted_s[-1] - 0.5 / own:
            middles_s = (times_s[1:] + times_s[:-1]) / 2  # the nearest frame of each time
            return np.searchsorted(middles_s, times_s[0] + wanted_s), rate
    return spread(available, num_frames), slower(own, available, num_frames)


def spread(available: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` frames over all the `available` ones; too few: some are shown twice."""
    return np.linspace(0, available - 1, wanted).round().astype(int)


def slower(fps: float | None, available: int, wanted: int) -> float:
    """Frame rate after keeping `wanted` of `available` frames of the same duration."""
    if not fps or wanted == available or available < 2:
        return float(fps or 1.0)
    return fps * max(wanted - 1, 1) / (available - 1)


def fit_frames(frames: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """uint8 `t h w 3` to uint8 `t height width 3`: cover, then crop the middle; where it fits, as it is."""
    height, width = frames.shape[1:3]
    if (height, width) == (height_px, width_px):
        return frames
    scale = max(height_px / height, width_px / width)
    size = (max(height_px, round(height * scale)), max(width_px, round(width * scale)))
    video = torch.from_numpy(frames.astype(np.float32)).permute(0, 3, 1, 2)
    video = F.interpolate(video, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - height_px) // 2, (size[1] - width_px) // 2
    video = video[..., top : top + height_px, left : left + width_px]
    return video.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
