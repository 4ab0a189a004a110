"""One parent (a video or a picture) -> the rows of its clips, good or bad. Runs in a child process.

Pure but for reading the parent's bytes; every way in which a file can be bad ends in a row.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infra.errors import DataError
from infra.pictures import decode_picture, open_picture, upright_size
from infra.storage import filesystem, is_remote, stream_bytes
from pipeline.clips.filters import FRAMES_PER_CLIP, FilterConfig, judge_by_facts, judge_by_frames
from pipeline.clips.quality import STEP_S, QualityConfig, judge_motion, judge_picture
from pipeline.clips.shots import find_shots
from pipeline.clips.sources.base import Cut, Item, is_url, without_credentials
from pipeline.clips.table import Row
from pipeline.media.frames import MAX_PIXELS, VideoInfo, clip_times, decode_frames, probe
from pipeline.media.phash import phash64
from pipeline.media.store import image_kind, looks_like_text, open_media, row_errors
from pipeline.schema import Media, RowError, Status, clip_id

LOOK_PX: tuple[int, int] = (64, 64)
"""Size of the frames that filters and the perceptual hash look at."""
END_SLACK_S = 1.0
"""A range may end this much after the video does (manifests round): it is cut short, not refused."""


def inspect_parent(item: dict[str, Any], found: dict[str, Any], shots: str, filters: FilterConfig) -> list[Row]:
    """The rows of one parent.

    `found` is what fetching says: local_uri, and etag, last_modified, attempt, status, error if any.

    Returns:
        One row a clip, null columns left out; at least one.
    """
    parent = Item.from_json(item)
    if parent.status or found.get("status"):
        status = parent.status or found["status"]
        return dead_rows(parent, found, Status(status), parent.error or found.get("error") or "")
    try:
        media = open_media(found["local_uri"])
        head, digest = _head_and_sha256(media)
        found = {**found, "source_sha256": digest}
        kind = image_kind(head)
        if not head:
            raise RowError(Status.EMPTY, "0 bytes")
        if kind is None and looks_like_text(head):
            raise RowError(Status.WRONG_TYPE, f"text, not media: {head[:40]!r}")
        if kind:
            return _image_rows(parent, found, media, filters)
        return _video_rows(parent, found, media, shots, filters)
    except RowError as error:
        return dead_rows(parent, found, error.status, str(error))
    except FileNotFoundError as error:
        return dead_rows(parent, found, Status.NOT_FOUND, _line(error))
    except MemoryError:
        return dead_rows(parent, found, Status.TOO_LARGE, "needs more memory than a worker may use")
    except (OSError, DataError) as error:
        status = Status.UNREACHABLE if is_remote(found["local_uri"]) else Status.BAD_ROW
        return dead_rows(parent, found, status, _line(error))
    except Exception as error:  # noqa: BLE001 - the row boundary: one odd file must cost one row
        return dead_rows(parent, found, Status.UNDECODABLE, f"{type(error).__name__}: {_line(error)}")


def dead_rows(parent: Item, found: dict[str, Any], status: Status, error: str) -> list[Row]:
    """A row for each clip of a parent that can't be used; clips that were bad before keep their fate."""
    rows = []
    for cut in parent.cuts:
        row = _row(parent, found, cut, cut.start_s or 0.0, cut.end_s or 0.0, parent.media)
        reason = error.encode("utf-8", "backslashreplace").decode()  # it may quote a name that is not UTF-8
        rows.append(_with_fate(row, cut) or {**row, "status": status.value, "error": reason})
    return rows


def _video_rows(
    parent: Item, found: dict[str, Any], media: str | bytes, shots: str, filters: FilterConfig
) -> list[Row]:
    info = probe(media)
    rows = [_video_row(parent, found, cut, info) for cut in _cuts(parent, media, info, shots)]
    for row in rows:
        if row["status"] == Status.OK.value:
            _set_fate(row, judge_by_facts(row, filters))
    look = [row for row in rows if row["status"] == Status.OK.value]
    if look:
        times_s = [t for row in look for t in clip_times(row["start_s"], row["end_s"], FRAMES_PER_CLIP)]
        frames = decode_frames(media, times_s, size_px=LOOK_PX)
        for row, clip in zip(look, frames.reshape(len(look), FRAMES_PER_CLIP, *LOOK_PX, 3), strict=True):
            _judge(row, clip, filters)
            _look_closer(row, media, filters.quality)
    return rows


def judge_clip(row: Row, filters: FilterConfig) -> Row:
    """A good clip that was left out before its frames were seen: the row with its hash, by all filters.

    Raises:
        RowError: its source gives no frames.
    """
    row = {**row, "status": Status.OK.value, "error": None}
    _set_fate(row, judge_by_facts(row, filters))
    if row["status"] != Status.OK.value:
        return row
    uri, sha256 = row["local_uri"] or row["source_uri"], row["source_sha256"]
    with row_errors():
        media = open_media(uri, sha256)
        if row["media"] == Media.IMAGE:
            _judge(row, look_at_image(media)[1][None], filters)
            _judge_picture(row, lambda: _decode_image(media), filters.quality)
        else:
            times_s = clip_times(row["start_s"], row["end_s"], FRAMES_PER_CLIP)
            _judge(row, decode_frames(media, times_s, size_px=LOOK_PX), filters)
            _look_closer(row, media, filters.quality)
    return row


def _look_closer(row: Row, media: str | bytes, quality: QualityConfig) -> None:
    """Motion and picture quality of a video's clip, where they are asked for."""
    times_s = clip_times(row["start_s"], row["end_s"], FRAMES_PER_CLIP)
    if row["status"] == Status.OK.value and quality.asks_motion:
        both = [t for time_s in times_s for t in (time_s, time_s + STEP_S)]
        pairs = decode_frames(media, both, size_px=LOOK_PX).reshape(FRAMES_PER_CLIP, 2, *LOOK_PX, 3)
        _set_fate(row, _fate(Status.FILTERED_MOTION, judge_motion(pairs, quality)))
    middle_s = times_s[FRAMES_PER_CLIP // 2]
    _judge_picture(row, lambda: Image.fromarray(decode_frames(media, [middle_s])[0]), quality)


def _judge_picture(row: Row, decode: Callable[[], Image.Image], quality: QualityConfig) -> None:
    if row["status"] == Status.OK.value and quality.asks_picture:
        _set_fate(row, _fate(Status.FILTERED_QUALITY, judge_picture(decode(), quality)))


def _cuts(parent: Item, media: str | bytes, info: VideoInfo, shots: str) -> list[Cut]:
    """The corpus's own clips; those without times are cut into shots if the config says so."""
    cuts: list[Cut] = []
    for cut in parent.cuts:
        if cut.status or cut.start_s is not None or shots == "whole":
            cuts.append(cut)
        else:
            found = find_shots(media)
            cuts += [Cut(cut.caption, start, min(end, info.duration_s)) for start, end in found]
    return cuts


def _video_row(parent: Item, found: dict[str, Any], cut: Cut, info: VideoInfo) -> Row:
    start_s = cut.start_s or 0.0
    end_s = info.duration_s if cut.end_s is None else cut.end_s
    late = start_s >= info.duration_s or end_s > info.duration_s + END_SLACK_S
    if not late:
        end_s = min(end_s, info.duration_s)
    row = _row(parent, found, cut, start_s, end_s, "video")
    row |= {"width_px": info.width_px, "height_px": info.height_px, "fps": info.fps}
    row["num_frames"] = max(1, round((end_s - start_s) * info.fps))
    if late and not cut.status:
        error = f"range [{start_s:g}, {end_s:g}] s, but the video lasts {info.duration_s:g} s"
        return {**row, "status": Status.BAD_RANGE.value, "error": error}
    return _with_fate(row, cut) or row


def _image_rows(parent: Item, found: dict[str, Any], media: str | bytes, filters: FilterConfig) -> list[Row]:
    (width, height), small = look_at_image(media)
    rows = []
    for cut in parent.cuts:
        row = _row(parent, found, cut, 0.0, 0.0, "image")
        row |= {"width_px": width, "height_px": height, "num_frames": 1}
        if cut.status:
            row = _with_fate(row, cut) or row
        else:
            _set_fate(row, judge_by_facts(row, filters))
        if row["status"] == Status.OK.value:
            _judge(row, small[None], filters)
            _judge_picture(row, lambda: _decode_image(media), filters.quality)
        rows.append(row)
    return rows


def look_at_image(media: str | bytes) -> tuple[tuple[int, int], np.ndarray]:
    """((width, height) upright, uint8 `64 64 3`) of a picture, decoded no larger than needed.

    Raises:
        RowError: not a picture that can be decoded, or too large a one.
    """
    with row_errors(), io.BytesIO(media) if isinstance(media, bytes) else _open(media) as file:
        image = open_picture(file, max_pixels=MAX_PIXELS)
        height, width = upright_size(image)
        return (width, height), np.asarray(decode_picture(image, shrink_to_px=LOOK_PX))


def _decode_image(media: str | bytes) -> Image.Image:
    with row_errors(), io.BytesIO(media) if isinstance(media, bytes) else _open(media) as file:
        return decode_picture(file, max_pixels=MAX_PIXELS)


def _judge(row: Row, frames: np.ndarray, filters: FilterConfig) -> None:
    row["phash"] = phash64(frames[len(frames) // 2])
    _set_fate(row, judge_by_frames(row, frames, filters))


def _row(parent: Item, found: dict[str, Any], cut: Cut, start_s: float, end_s: float, media: str) -> Row:
    uri, local_uri = _public(parent.uri), found.get("local_uri")
    source = found.get("source_sha256") or uri
    row = {
        "clip_id": clip_id(source, start_s, end_s, cut.caption),
        "media": "image" if media == "image" else "video",
        "caption": cut.caption,
        "source_uri": uri,
        "source_sha256": found.get("source_sha256"),
        "start_s": start_s,
        "end_s": end_s,
        "source_name": parent.source_name,
        "licence": parent.licence,
        "split": parent.split,
        "local_uri": local_uri and _public(local_uri),
        "etag": found.get("etag"),
        "last_modified": found.get("last_modified"),
        "attempt": found.get("attempt", 1),
        "status": Status.OK.value,
    }
    return {key: value for key, value in row.items() if value is not None}


def _public(uri: str) -> str:
    return without_credentials(uri) if is_url(uri) else uri


def _with_fate(row: Row, cut: Cut) -> Row | None:
    return {**row, "status": cut.status, "error": cut.error} if cut.status else None


def _set_fate(row: Row, fate: tuple[Status, str] | None) -> None:
    if fate:
        row["status"], row["error"] = fate[0].value, fate[1]


def _fate(status: Status, reason: str | None) -> tuple[Status, str] | None:
    return (status, reason) if reason else None


def _head_and_sha256(media: str | bytes) -> tuple[bytes, str]:
    digest, head = hashlib.sha256(), b""
    for chunk in [media] if isinstance(media, bytes) else stream_bytes(media):
        head = head or chunk[:4096]
        digest.update(chunk)
    return head, digest.hexdigest()


def _open(uri: str) -> Any:
    if not is_remote(uri):
        return Path(uri).open("rb")
    fs, path = filesystem(uri)
    return fs.open_input_file(path)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
