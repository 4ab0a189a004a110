"""Captions that lie beside a file: `a.mp4` with `a.txt`, `a.json`, `a.vtt` or `a.srt`."""

import json
import re
from collections.abc import Iterator
from typing import Any

from pipeline.clips.sources.base import Cut, clean_caption, make_cut, parse_list
from pipeline.schema import Status

SIDECAR_SUFFIXES = (".txt", ".json", ".vtt", ".srt")
CAPTION_KEYS = ("caption", "text", "title", "description")
CUE_TIMES = re.compile(r"(\S+)\s+-->\s+(\S+)")
TAG = re.compile(r"<[^>]*>")


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
    except ValueError as error:
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
        else Cut(status=Status.BAD_RANGE.value, error=f"range {pair!r} is not [start, end]")
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
