"""Corpora: one small reader a kind, behind one interface (`base.Reader`).

A new kind is one class with `items` and `fingerprint`, and one line in `open_source`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field

from infra.config import Config
from infra.errors import ConfigError
from infra.storage import absolute, exists, list_files
from pipeline.clips.sources.base import Cut, Item, Reader, is_url, suffix_of
from pipeline.clips.sources.folder import FolderReader
from pipeline.clips.sources.manifest import ManifestReader
from pipeline.clips.sources.page import PageReader
from pipeline.clips.sources.tar import TarReader
from pipeline.clips.sources.urls import UrlReader

__all__ = ["Cut", "Item", "Reader", "SourceConfig", "open_source", "read_items", "source_from_path"]

MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
LISTINGS = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables that, lying at the top of a folder, describe it (Hugging Face's imagefolder and ours)."""


class SourceConfig(Config):
    """One corpus, and what it says about its rows."""

    kind: Literal["folder", "manifest", "urls", "tar", "page"]
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
    max_pages: int = Field(default=1000, ge=1)
    """For pages: stop looking after so many."""


def open_source(config: SourceConfig) -> Reader:
    """The reader of a corpus.

    Raises:
        ConfigError: nothing there, or a table without the columns that are needed.
    """
    if config.kind != "page" and "{" not in config.path and not exists(config.path):
        raise ConfigError(f"no corpus at {config.path}", cure="check the path of the source")
    if config.kind == "folder":
        return FolderReader(config.path)
    if config.kind == "tar":
        return TarReader(config.path)
    if config.kind == "urls":
        return UrlReader(config.path)
    if config.kind == "page":
        return PageReader(config.path, config.depth, config.max_pages)
    return ManifestReader(config.path, config.columns, config.allow_outside_root)


def read_items(config: SourceConfig, reader: Reader) -> Iterator[Item]:
    """The reader's items, with what the config says about all of them filled in."""
    name = config.name or config.path.rstrip("/").rpartition("/")[2]
    for item in reader.items():
        yield replace(
            item,
            source_name=name,
            licence=item.licence or config.licence,
            split=item.split or config.split,
            media=item.media if config.media == "auto" else config.media,
        )


def source_from_path(path: str) -> SourceConfig:
    """Guess what lies at a path or address.

    Raises:
        ConfigError: nothing there, or a file of no known kind.
    """
    suffix = suffix_of(path.removesuffix(".gz"))
    if is_url(path):
        return SourceConfig(kind="page", path=path)
    if suffix == ".tar":
        return SourceConfig(kind="tar", path=path)
    if not exists(path):
        raise ConfigError(f"no corpus at {path}", cure="give a folder, a table or an http address")
    if suffix in MANIFESTS:
        return SourceConfig(kind="manifest", path=path)
    if suffix == ".txt":
        return SourceConfig(kind="urls", path=path)
    top = [file.rpartition("/")[2] for file in list_files(path, recursive=False)]
    listing = next((name for name in LISTINGS if name in top), None)
    if listing:
        return SourceConfig(
            kind="manifest", path=f"{absolute(path)}/{listing}", name=absolute(path).split("/")[-1]
        )
    if top and all(suffix_of(name) == ".tar" for name in top):
        return SourceConfig(kind="tar", path=path)
    if suffix and not top and list_files(path) == []:
        raise ConfigError(
            f"don't know what {path} is",
            legal="a folder, .csv .tsv .jsonl .parquet .tar, a .txt list of URLs, an http address",
        )
    return SourceConfig(kind="folder", path=path)
