"""A clip as encoded video: the source's own bytes where it is the whole file, else cut and re-encoded."""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
from av.error import FFmpegError

from pipeline.media.frames import decode_frames, probe
from pipeline.schema import RowError, Status

WHOLE_S = 0.05  # a clip this close to both ends of its source is the whole source


@dataclass(frozen=True)
class Mp4:
    """What lies in the encoded bytes."""

    num_frames: int
    height_px: int
    width_px: int
    fps: float


def cut_mp4(source: str | bytes, start_s: float, end_s: float, *, crf: int) -> tuple[bytes, Mp4]:
    """The stretch [start_s, end_s] of a source as mp4 bytes; the same bytes each time.

    Raises:
        RowError: the source can't be decoded.
    """
    info = probe(source)
    if info.container == "mp4" and start_s <= WHOLE_S and end_s >= info.duration_s - WHOLE_S:
        found = Mp4(info.num_frames, info.height_px, info.width_px, info.fps)
        return _bytes(source), found
    count = max(1, round((end_s - start_s) * info.fps))
    size = (info.height_px // 2 * 2 or 2, info.width_px // 2 * 2 or 2)  # 4:2:0 needs even sides
    times_s = [start_s + number / info.fps for number in range(count)]
    rate = Fraction(info.fps).limit_denominator(1001)
    sink = io.BytesIO()
    try:
        with av.open(sink, "w", format="mp4") as container:
            # One thread: x264's output depends on how many it is given.
            options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for first in range(0, count, 32):  # frames of a long clip don't fit in memory at once
                for picture in decode_frames(source, times_s[first : first + 32], size_px=size):
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except FFmpegError as error:
        raise RowError(Status.UNDECODABLE, f"encoding: {error}") from error
    return sink.getvalue(), Mp4(count, *size, float(rate))


def _bytes(source: str | bytes) -> bytes:
    from infra.storage import read_bytes

    return source if isinstance(source, bytes) else read_bytes(source)
