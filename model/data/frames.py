"""Frames of a target: decode, spread over the clip, fit to the bucket. Pure functions."""

import io
from fractions import Fraction

import numpy as np
import torch
from torch.nn import functional as F


def decode_video(
    source: str | io.BytesIO, num_frames: int, *, span_s: tuple[float, float] | None = None
) -> tuple[np.ndarray, float]:
    """`num_frames` frames spread evenly over a video (or a span of it), and their frame rate.

    Raises:
        ValueError: no frame could be decoded.
    """
    import av

    start_s, end_s = span_s or (0.0, float("inf"))
    frames, times_s = [], []
    with av.open(source, "r") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # the loader has threads of its own
        base = stream.time_base or Fraction(1, 1000)
        if start_s > 0:
            container.seek(int(start_s / base), stream=stream)
        for frame in container.decode(stream):
            time_s = float((frame.pts or 0) * base)
            if time_s >= end_s - 1e-6 and frames:
                break
            if time_s >= start_s - 1e-6:
                frames.append(frame.to_ndarray(format="rgb24"))
                times_s.append(time_s)
    if not frames:
        raise ValueError("no frame could be decoded")
    fps = (len(frames) - 1) / (times_s[-1] - times_s[0]) if len(frames) > 1 else 1.0
    keep = spread(len(frames), num_frames)
    return np.stack([frames[n] for n in keep]), slower(fps, len(frames), num_frames)


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
