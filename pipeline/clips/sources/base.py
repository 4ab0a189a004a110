"""What every reader of a corpus yields: parents, each with the clips that the corpus lists in it."""

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pipeline.schema import Status

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".flv"}
    | {".wmv", ".3gp", ".ogv", ".y4m", ".vob"}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
CLOCK = re.compile(r"^(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)$")


@dataclass(frozen=True)
class Cut:
    """One clip that the corpus lists: a caption and, if it says so, a range of the parent."""

    caption: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    status: str | None = None
    """Its fate, where the reader already knows that it is bad."""
    error: str | None = None


@dataclass(frozen=True)
class Item:
    """One parent (a video or a picture) and its clips. Plain values: it travels as JSON."""

    uri: str
    """Absolute path, URI or URL, or a piece of a file (pipeline/media/store.py)."""
    media: str = "auto"
    """video, image, or auto: look at the bytes."""
    cuts: tuple[Cut, ...] = (Cut(),)
    split: str | None = None
    licence: str | None = None
    source_name: str | None = None
    status: str | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Item":
        return Item(**{**values, "cuts": tuple(Cut(**cut) for cut in values["cuts"])})


class Reader(Protocol):
    """The one interface of all corpora. `items` gives the same list each time that it is called."""

    def items(self) -> Iterator[Item]: ...

    def fingerprint(self) -> str:
        """Changes when the list changes: a finished crawl of an unchanged corpus is not redone."""
        ...


def is_url(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def suffix_of(uri: str) -> str:
    """Lower-case file name extension, of a URL's path too; "" if there is none."""
    name = uri.split("?")[0].split("#")[0].rpartition("/")[2]
    return "." + name.rpartition(".")[2].lower() if "." in name else ""


def media_of(uri: str) -> str:
    suffix = suffix_of(uri)
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in IMAGE_SUFFIXES else "auto"


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
    if any("\ud800" <= c <= "\udfff" for c in value):
        return None, "caption is not UTF-8"
    text = " ".join(value.replace("\0", " ").split())
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
    except (TypeError, ValueError):
        raise ValueError(f"time {value!r} is not a number of seconds") from None
    if not math.isfinite(seconds):
        raise ValueError(f"time {value!r} is not finite")
    return seconds


def parse_list(value: Any) -> Any:
    """A list that a table holds as such, as JSON, or as a Python literal (Panda-70M's CSV)."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"not a list: {value[:60]!r}") from None
