"""Exact standalone clips, for those who need files: the range decoded and encoded again, pictures only."""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from infra.storage import is_remote, write_bytes
from pipeline.media.frames import Source, opened, to_rgb

ENCODER = "libx264"
OPTIONS = {"crf": "18", "preset": "medium", "threads": "1", "fflags": "+bitexact"}
"""Visually lossless by x264's own account; one thread, so that the same clip gives the same bytes."""


def write_clip(source: Source, start_s: float, end_s: float, uri: str) -> None:
    """Write the frames of [start_s, end_s) as an mp4 of their own that starts at 0; whole or not at all.

    Upright, square pixels, even sides (H.264's chroma needs them), the times of the original frames.
    """
    folder = Path(os.environ.get("TMPDIR", "/tmp")) if is_remote(uri) else Path(uri).parent
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{uri.rpartition('/')[2]}.{os.getpid()}.mp4"
    try:
        with opened(source) as (container, stream), av.open(str(part), "w") as output:
            _copy_frames(container, stream, output, start_s, end_s)
        if is_remote(uri):
            write_bytes(uri, part.read_bytes())
        else:
            part.replace(uri)
    finally:
        part.unlink(missing_ok=True)


def _copy_frames(container: Any, stream: Any, output: Any, start_s: float, end_s: float) -> None:
    base: Fraction = stream.time_base
    first = stream.start_time or 0
    container.seek(first + int(Fraction(start_s) / base), stream=stream)
    target, origin = None, 0
    for frame in container.decode(stream):
        time_s = float((frame.pts - first) * base)
        if time_s >= end_s - 1e-6:
            break
        if time_s < start_s - 1e-6:
            continue
        picture = to_rgb(frame, stream)
        height, width = (side // 2 * 2 for side in picture.shape[:2])
        if target is None:
            target = output.add_stream(ENCODER, rate=stream.average_rate or 30, options=OPTIONS)
            target.height, target.width, target.pix_fmt = height, width, "yuv420p"
            target.codec_context.time_base = base
            origin = frame.pts
        copy = av.VideoFrame.from_ndarray(picture[:height, :width].copy(), format="rgb24")
        copy.pts, copy.time_base = frame.pts - origin, base
        output.mux(target.encode(copy))
    if target is not None:
        output.mux(target.encode())
