"""Probes videos and decodes frames. Pure: bytes in, arrays out.

Times are seconds from the first frame of the video stream. The frame at time t is the one on screen at
t: the last whose presentation time is not after t (the first frame for t < 0, the last past the end).

Sparse frames are planned, not streamed (pipeline/media/plan.py); the pixels are those of a full decode.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from infra.storage import filesystem, is_remote
from infra.videos import UnlistedContainerError, open_video
from pipeline.media.plan import PlanError, planned_frames
from pipeline.schema import RowError, Status

Source = str | Path | bytes | BinaryIO
Size = tuple[int, int] | None
MAX_PIXELS = 8192 * 8192
"""A larger picture is refused before its decoder allocates anything."""
TOLERANCE_S = 0.0005
"""Slack of a wanted time: containers round presentation times, Matroska's to whole milliseconds."""


@dataclass(frozen=True)
class VideoInfo:
    """What the container says, checked as far as possible without decoding."""

    width_px: int
    """Display width: rotation and pixel aspect applied."""
    height_px: int
    duration_s: float
    """Of the video stream, from the packets' times where the header says nothing."""
    fps: float
    """Average frames per second."""
    num_frames: int


def clip_times(start_s: float, end_s: float, n: int) -> list[float]:
    """The middles of `n` equal parts of [start_s, end_s]: n = 1 gives the clip's middle."""
    step_s = (end_s - start_s) / n
    return [start_s + (i + 0.5) * step_s for i in range(n)]


def probe(source: Source) -> VideoInfo:
    """Decode the first frame and count the packets: headers are known to lie.

    Raises:
        RowError: empty, not a video, audio only, not decodable, or too large a picture.
    """
    with opened(source) as (container, stream):
        first = next((f for f in container.decode(stream)), None)
        if first is None:
            raise RowError(Status.UNDECODABLE, "no frame could be decoded")
        height, width = display_size(first, stream)
    with opened(source) as (container, stream):
        num_frames, duration_s = _extent(container, stream)
        fps = float(stream.average_rate or 0) or num_frames / max(duration_s, 1e-9)
        return VideoInfo(
            width_px=width,
            height_px=height,
            duration_s=duration_s,
            fps=fps,
            num_frames=num_frames,
        )


def decode_frames(source: Source, times_s: Sequence[float], *, size_px: Size = None) -> np.ndarray:
    """The frames on screen at `times_s`, in that order.

    Times may come in any order and repeat; `size_px` is (height, width) to scale to, None = the display size.

    Returns:
        uint8 RGB `n h w 3`.

    Raises:
        RowError: nothing to decode, or the decoder refuses it.
        ValueError: no time, or one that is not finite.
    """
    if not times_s or not all(math.isfinite(t) for t in times_s):
        raise ValueError(f"give at least one finite time, got {list(times_s)}")
    with opened(source) as (container, stream):
        wanted = [_ticks(t, stream) for t in times_s]
        found: dict[int, np.ndarray] = {}
        try:
            for ticks, frame in planned_frames(container, stream, sorted(set(wanted))):
                found[ticks] = to_rgb(frame, stream, size_px)
        except PlanError:
            found = decode_from_start(source, sorted(set(wanted)), size_px)
        return np.stack([found[ticks] for ticks in wanted])


def frame_from(source: Source, time_s: float) -> np.ndarray:
    """The first frame that begins at `time_s` or after: uint8 RGB `h w 3`. Training reads a span's first so.

    Raises:
        RowError: there is none, or the decoder refuses it.
    """
    with opened(source) as (container, stream):
        base, begin = stream.time_base or Fraction(1, 90000), stream.start_time or 0
        if time_s > 0:
            container.seek(int(time_s / base) + begin, stream=stream)
        for frame in container.decode(stream):
            if frame.pts is not None and (frame.pts - begin) * base >= time_s - 1e-6:
                return to_rgb(frame, stream)
    raise RowError(Status.UNDECODABLE, f"no frame from {time_s:g} s on")


def decode_from_start(source: Source, wanted: list[int], size_px: Size = None) -> dict[int, np.ndarray]:
    """Decode every frame up to the last wanted tick and keep the one on screen at each."""
    with opened(source) as (container, stream):
        return _stream(container, stream, wanted, size_px)


def _stream(
    container: InputContainer, stream: VideoStream, wanted: list[int], size_px: Size
) -> dict[int, np.ndarray]:
    """For each of the sorted ticks, the last frame that is not after it (the first if none is)."""
    found: dict[int, np.ndarray] = {}
    previous: VideoFrame | None = None
    todo = list(wanted)
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        while todo and frame.pts > todo[0]:
            found[todo.pop(0)] = to_rgb(previous or frame, stream, size_px)
        if not todo:
            return found
        previous = frame
    if previous is None:
        raise RowError(Status.UNDECODABLE, "no frame could be decoded")
    found.update((ticks, to_rgb(previous, stream, size_px)) for ticks in todo)
    return found


@contextmanager
def opened(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first real video stream, one decoder thread.

    Raises:
        RowError: empty, of no listed format, audio only, or too large a picture.
    """
    file, owned = _file(source)
    try:
        with _open(file) as container:
            yield container, _video_stream(container)
    except FFmpegError as error:
        raise RowError(Status.UNDECODABLE, f"container: {error}") from error
    finally:
        if owned:
            owned.close()  # PyAV keeps a reference to a file object: its memory would leak


def _open(file: Any) -> InputContainer:
    try:
        return open_video(file)
    except UnlistedContainerError as error:
        raise RowError(Status.UNDECODABLE, str(error)) from error


def _file(source: Source) -> tuple[Any, Any]:
    if isinstance(source, bytes):
        if not source:
            raise RowError(Status.EMPTY, "0 bytes")
        owned = io.BytesIO(source)
        return owned, owned
    if isinstance(source, str) and is_remote(source):
        fs, path = filesystem(source)
        owned = fs.open_input_file(path)
        return owned, owned
    if isinstance(source, str | Path):
        path = Path(str(source).removeprefix("file://"))
        if not path.is_file():
            raise RowError(Status.NOT_FOUND, f"no file {path}")
        if path.stat().st_size == 0:
            raise RowError(Status.EMPTY, "0 bytes")
        return f"file:{path}", None
    return source, None


def _video_stream(container: InputContainer) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        kinds = sorted({s.type for s in container.streams})
        raise RowError(Status.NO_VIDEO, f"no video stream, only {', '.join(kinds) or 'nothing'}")
    stream = streams[0]
    context = stream.codec_context
    if context is None:  # pyright: ignore[reportUnnecessaryComparison] - PyAV: no decoder for it
        raise RowError(Status.UNDECODABLE, "no decoder for the video stream")
    if not context.width or not context.height:
        raise RowError(Status.UNDECODABLE, "the video stream has no size")
    if context.width * context.height > MAX_PIXELS:
        raise RowError(Status.TOO_LARGE, f"picture of {context.width}x{context.height} pixels")
    context.thread_count = 1  # one worker, one core: threads would only add CPU time
    return stream


def _extent(container: InputContainer, stream: VideoStream) -> tuple[int, float]:
    """Number of frames and duration in seconds, by demuxing (headers are known to lie)."""
    first, last, count, step = None, None, 0, 0
    for packet in container.demux(stream):
        time = packet.pts if packet.pts is not None else packet.dts
        if packet.size == 0 or time is None or packet.is_discard:
            continue
        count += 1
        first = time if first is None else min(first, time)
        if last is None or time >= last:
            last, step = time, packet.duration or step
    if first is None or last is None:
        raise RowError(Status.UNDECODABLE, "the video stream has no packets")
    base = stream.time_base or Fraction(1, 90000)
    if not step:
        step = round((last - first) / max(count - 1, 1)) or 1
    return count, float((last - first + step) * base)


def _ticks(time_s: float, stream: VideoStream) -> int:
    """A time as a presentation time stamp of the stream."""
    base = stream.time_base or Fraction(1, 90000)
    slack = min(Fraction(1, 2), Fraction(TOLERANCE_S) / base)
    return math.floor(Fraction(max(time_s, 0.0)) / base + slack) + (stream.start_time or 0)


def display_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(height, width) in pixels as shown: pixel aspect and rotation applied."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    height, width = frame.height, max(1, round(frame.width * aspect))
    return (width, height) if frame.rotation % 180 else (height, width)


def to_rgb(frame: VideoFrame, stream: VideoStream, size_px: Size = None) -> np.ndarray:
    """One decoded frame as uint8 RGB `h w 3`: upright, full range, scaled to `size_px`."""
    size_px = size_px or display_size(frame, stream)
    turns = round(frame.rotation / 90) % 4
    height, width = size_px[::-1] if turns % 2 else size_px
    picture = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, turns))
