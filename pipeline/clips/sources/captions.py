"""Captions and times as corpora write them: values of tables, and sidecars (.txt, .json, .vtt, .srt)."""

import ast
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from pipeline.clips.sources.base import Cut, is_text
from pipeline.schema import MAX_CAPTION_CHARS, Status

SIDECAR_SUFFIXES = (".txt", ".json", ".vtt", ".srt")
CAPTION_KEYS = ("caption", "text", "title", "description")
CUE_TIMES = re.compile(r"(\S+)\s+-->\s+(\S+)")
TAG = re.compile(r"<[^>]*>")
CLOCK = re.compile(r"^(?:(\d{1,9}):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)$")


def read_sidecar(name: str, data: bytes) -> tuple[Cut, ...]:
    """The clips that one sidecar lists; a sidecar that can't be read is one cut with its fate."""
    caption, error = clean_caption(data)
    if error:
        return (Cut(status=Status.BAD_CAPTION.value, error=error),)
    if name.endswith((".vtt", ".srt")):
        cues = tuple(_cues(data.decode("utf-8-sig")))
        return cues or (Cut(),)
    if name.endswith(".json"):
        return _read_json(data)
    return (Cut(caption),)


def _read_json(data: bytes) -> tuple[Cut, ...]:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return (Cut(status=Status.BAD_CAPTION.value, error=f"sidecar is not JSON: {error}"),)
    if isinstance(value, str):
        return (make_cut(value),)
    if not isinstance(value, dict):
        return (Cut(status=Status.BAD_CAPTION.value, error="sidecar holds no mapping"),)
    return cuts_of(value, value.get("clips"))


def cuts_of(row: dict[str, Any], clips: Any = None) -> tuple[Cut, ...]:
    """Cuts of one mapping: `clips`, parallel lists of times and captions, or a single clip."""
    if isinstance(clips, list):
        rows = [clip if isinstance(clip, dict) else {} for clip in clips]
        return tuple(make_cut(_caption(r), r.get("start_s"), r.get("end_s")) for r in rows)
    try:
        times = parse_list(row.get("timestamps"))
        if times is None:  # one clip: "[Music] A man sings" is a caption, not a list
            return (make_cut(_caption(row), row.get("start_s"), row.get("end_s")),)
        return _parallel(times, parse_list(_caption(row)))
    except ValueError as error:
        return (Cut(status=Status.BAD_ROW.value, error=str(error)),)


def _parallel(times: Any, captions: Any) -> tuple[Cut, ...]:
    if isinstance(times, list) and times and not isinstance(times[0], list | tuple):
        times = [times]  # one range: [start, end]
    if isinstance(captions, str) or captions is None:
        captions = [captions] * (len(times) if isinstance(times, list) else 0)
    if not isinstance(times, list) or not isinstance(captions, list) or len(times) != len(captions):
        counts = [len(v) if isinstance(v, list) else type(v).__name__ for v in (times, captions)]
        error = f"{counts[0]} ranges but {counts[1]} captions"
        return (Cut(status=Status.BAD_ROW.value, error=error),)
    return tuple(
        make_cut(caption, *pair)
        if isinstance(pair, list | tuple) and len(pair) == 2
        else Cut(status=Status.BAD_RANGE.value, error=f"range {_short(pair)} is not [start, end]")
        for pair, caption in zip(times, captions, strict=True)
    )


def _caption(row: dict[str, Any]) -> Any:
    return next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), None)


def _cues(text: str) -> Iterator[Cut]:
    """Cues of a WebVTT or SubRip file: a line of times, then text until an empty line."""
    for block in re.split(r"\r?\n[ \t]*\r?\n", text):
        lines = block.strip().splitlines()
        place = next((i for i, line in enumerate(lines) if CUE_TIMES.search(line)), None)
        if place is None:
            continue
        match = CUE_TIMES.search(lines[place])
        assert match is not None
        yield make_cut(TAG.sub("", " ".join(lines[place + 1 :])), match[1], match[2])


def make_cut(caption: Any, start: Any = None, end: Any = None) -> Cut:
    """A cut from whatever a manifest holds; a value that can't be used becomes its fate."""
    text, error = clean_caption(caption)
    if error:
        return Cut(None, None, None, Status.BAD_CAPTION.value, error)
    try:
        start_s, end_s = parse_time(start), parse_time(end)
    except ValueError as problem:
        return Cut(text, None, None, Status.BAD_RANGE.value, str(problem))
    if start_s is None and end_s is None:
        return Cut(text)
    start_s = start_s or 0.0
    if start_s < 0 or (end_s is not None and end_s <= start_s):
        return Cut(text, None, None, Status.BAD_RANGE.value, f"range [{start_s}, {end_s}] s")
    return Cut(text, start_s, end_s)


def clean_caption(value: Any) -> tuple[str | None, str | None]:
    """(caption, error): white space collapsed, None for none; bytes and text must be UTF-8."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None, None
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return None, f"caption is not UTF-8: {error.reason} at byte {error.start}"
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = value[0]
    if not isinstance(value, str):
        return None, f"caption is a {type(value).__name__}, not text"
    if not is_text(value):
        return None, "caption is not UTF-8"
    text = " ".join(value.replace("\0", " ").split())
    if len(text) > MAX_CAPTION_CHARS:
        return None, f"caption of {len(text):,} characters, more than {MAX_CAPTION_CHARS:,}"
    return text or None, None


def parse_time(value: Any) -> float | None:
    """Seconds of a number, "12.5", "1:02:03.4" or "02:03,4"; None for none.

    Raises:
        ValueError: not a time, or not finite.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        clock = CLOCK.match(value.strip())
        if clock:
            hours, minutes, seconds = clock.groups()
            return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"time {_short(value)} is not a number of seconds") from None
    if not math.isfinite(seconds):
        raise ValueError(f"time {value!r} is not finite")
    return seconds


def _short(value: Any) -> str:
    try:
        return repr(value)[:60]
    except (ValueError, RecursionError):  # a whole number of more digits than Python prints
        return f"of type {type(value).__name__}"


def parse_list(value: Any) -> Any:
    """A list that a table holds as such, as JSON, or as a Python literal (Panda-70M's CSV)."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"not a list: {value[:60]!r}") from None
