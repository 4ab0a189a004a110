"""How videos are read and written by ffmpeg (PyAV): strangers' in listed containers, ours to the same bytes."""

from typing import Any

FORMATS = ("mov", "matroska", "avi", "mpeg", "mpegts", "flv", "asf", "ogg", "yuv4mpegpipe")
"""ffmpeg's demuxers that strangers' files may reach: containers whose bytes are all their own. Others run
scripts or open what they name: concat, hls, dash, sdp, imf, image sequences, ..."""
SAFE = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file,pipe"}
"""Options of `av.open`: ffmpeg looks at the bytes, and refuses what they turn out to be if it is not listed."""

X264 = {"threads": "1", "x264-params": "mbtree=0"}
"""Options of the encoder `libx264` with which the same frames give the same bytes. Its output depends on the
number of threads; and its macroblock tree (mbtree) reads memory that nobody wrote, where sides are no multiples
of 16. Without that tree files are an eighth to a fifth larger, as quick and as good (6 real clips)."""


class UnlistedContainerError(ValueError):
    """Bytes that are no container of `FORMATS`, or a damaged one."""


def open_video(source: Any) -> Any:
    """An `av.container.InputContainer` of a path (`file:...`) or a binary file; to be closed.

    Raises:
        UnlistedContainerError: no container of the list, or a damaged one.
        av.FFmpegError: any other of ffmpeg's complaints.
    """
    import av
    from av.error import ArgumentError

    try:
        return av.open(source, mode="r", metadata_errors="ignore", options=SAFE)
    except ArgumentError as error:  # what ffmpeg answers to a format that is not on the list
        reason = f"no container that is read here ({', '.join(FORMATS)}), or a damaged one: {error.strerror}"
        raise UnlistedContainerError(reason) from error
