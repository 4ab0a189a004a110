"""The corpus reader interface: yields parents, each with the clips that the corpus lists in it."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow.fs as pafs
from pydantic import Field, field_serializer, field_validator

from infra.config import Config
from infra.errors import ConfigError
from infra.storage import absolute, exists, filesystem, is_remote, list_files

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".flv"}
    | {".wmv", ".3gp", ".ogv", ".y4m", ".vob"}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
CREDENTIALS = re.compile(r"(?<=://)[^/?#]*@")
"""Name and password in an address."""


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


class SourceConfig(Config):
    """One corpus, and what it says about its rows."""

    kind: str
    """folder: files with sidecars; manifest: a table; urls: a list of addresses, one a line;
    tar: WebDataset archives; page: web pages to look through."""
    path: str
    """Path, URI or (page) address. A tar source takes a file, a folder or `{000..012}` braces."""
    name: str | None = None
    """Name of the corpus in its rows (`source_name`); None = the last part of the path."""
    licence: str | None = None
    """Licence of rows that state none themselves."""
    split: str | None = None
    """Split of rows that state none themselves."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For manifests: our column -> theirs, for uri, caption, start_s, end_s, timestamps, split,
    licence. What is not mapped is looked for under its usual names."""
    media: Literal["auto", "video", "image"] = "auto"
    """What the entries are; auto = by name, then by the bytes."""
    allow_outside_root: bool = False
    """May a manifest name files outside its own folder?"""
    depth: int = Field(default=1, ge=0, le=10)
    """For pages: how many links away from the first page, on the same site."""
    max_pages: int = Field(default=1000, ge=1, le=1_000_000)
    """For pages: stop looking after so many."""

    @field_serializer("path")
    def _public(self, path: str) -> str:
        """The config is stored with the output; a name and password in an address are not."""
        return without_credentials(path) if is_url(path) else path

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in READERS:
            raise ValueError(f"no reader of this kind; legal: {', '.join(READERS)}")
        return kind


class Web(Protocol):
    """What a reader may ask of the web."""

    def page(self, url: str) -> tuple[str, bytes]: ...


class Reader(ABC):
    """The one interface of all corpora; a new kind is a subclass that is registered by its name."""

    needs_web = False
    """Must `prepare` be called before `items`?"""

    @abstractmethod
    def __init__(self, config: SourceConfig) -> None:
        """Raise ConfigError unless there is such a corpus."""

    @classmethod
    def recognise(cls, path: str) -> SourceConfig | None:
        """The source at a path or address that a user named, if it is one of this kind."""
        return None

    def prepare(self, web: Web, folder: str) -> None:
        """Fetch what `items` needs, into `folder`, once for a job; asked only of readers with `needs_web`."""
        raise NotImplementedError(f"{type(self).__name__} says that it needs the web, and has no `prepare`")

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """The parents in a fixed order: the same list each time."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the list changes: a finished crawl of an unchanged corpus is not redone."""


READERS: dict[str, type[Reader]] = {}
"""Kind -> reader. What a path is, is asked of the one registered last first."""


def register(kind: str, reader: type[Reader]) -> None:
    """Make a reader known by the name that configs use."""
    READERS[kind] = reader


def require_path(path: str) -> str:
    """The absolute path of a corpus.

    Raises:
        ConfigError: nothing there.
    """
    if not exists(path):
        raise ConfigError(f"no corpus at {path}", cure="give a folder, a table or an http address")
    return absolute(path)


def names_in(folder: str) -> list[str]:
    """Names of the files at the top of a folder; [] for a file, or for nothing."""
    if not is_remote(folder):  # Arrow can't say names that are not UTF-8
        place = Path(absolute(folder))
        return sorted(file.name for file in place.iterdir() if file.is_file()) if place.is_dir() else []
    files = list_files(folder, recursive=False) if is_folder(folder) else []
    return [file.rpartition("/")[2] for file in files]


def is_folder(path: str) -> bool:
    fs, place = filesystem(path)
    return fs.get_file_info(place).type == pafs.FileType.Directory


def is_url(uri: str) -> bool:
    return uri[:8].lower().startswith(("http://", "https://"))


def without_credentials(text: str) -> str:
    """An address, or a message that names one, as it may be stored: nobody's name and password in it."""
    return CREDENTIALS.sub("", text)


def is_text(value: str) -> bool:
    """Can it be written as UTF-8? Names and captions of strangers may hold half of a surrogate pair."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def suffix_of(uri: str) -> str:
    """Lower-case file name extension, of a URL's path too; "" if there is none."""
    if is_url(uri):  # a file may well be called "What is this? #2.mp4"
        uri = uri.split("?")[0].split("#")[0]
    name = uri.rpartition("/")[2]
    return "." + name.rpartition(".")[2].lower() if "." in name else ""


def media_of(uri: str) -> str:
    suffix = suffix_of(uri)
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in IMAGE_SUFFIXES else "auto"


def is_media(name: str) -> bool:
    return suffix_of(name) in VIDEO_SUFFIXES | IMAGE_SUFFIXES
