"""Opens videos of strangers by ffmpeg (PyAV): listed containers, files and pipes alone."""

from typing import Any

FORMATS = ("mov", "matroska", "avi", "mpeg", "mpegts", "flv", "asf", "ogg", "yuv4mpegpipe")
"""ffmpeg's demuxers that strangers' files may reach: containers whose bytes are all their own. Others run
scripts or open what they name: concat, hls, dash, sdp, imf, image sequences, ..."""
SAFE = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file,pipe"}
"""Options of `av.open`: ffmpeg looks at the bytes, and refuses what they turn out to be if it is not listed."""


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
