"""Corpora: one small reader a kind, behind one interface (`base.Reader`).

A new kind is one class (`recognise`, `items`, `fingerprint`) and one call of `register`: here, or by whoever
starts the crawl.
"""

from collections.abc import Iterator
from dataclasses import replace

from infra.errors import ConfigError
from pipeline.clips.sources.base import (
    READERS,
    Cut,
    Item,
    Reader,
    SourceConfig,
    is_text,
    register,
    without_credentials,
)
from pipeline.clips.sources.files import FolderReader, TarReader
from pipeline.clips.sources.page import PageReader
from pipeline.clips.sources.tables import ManifestReader, UrlReader
from pipeline.schema import Status

__all__ = ["Cut", "Item", "Reader", "SourceConfig", "open_source", "read_items", "register", "source_from_path"]

# In the order of generality: what a path is, is asked of the last one first.
register("folder", FolderReader)
register("tar", TarReader)
register("manifest", ManifestReader)
register("urls", UrlReader)
register("page", PageReader)


def open_source(config: SourceConfig) -> Reader:
    """The reader of a corpus.

    Raises:
        ConfigError: nothing there, or a table without the columns that are needed.
    """
    return READERS[config.kind](config)


def read_items(config: SourceConfig, reader: Reader) -> Iterator[Item]:
    """The reader's items, with what the config says about all of them filled in."""
    name = config.name or without_credentials(config.path).rstrip("/").rpartition("/")[2]
    for item in reader.items():
        if not is_text(item.uri):
            uri = item.uri.encode("utf-8", "backslashreplace").decode()
            item = Item(uri, status=Status.BAD_ROW.value, error="the name is not UTF-8")
        yield replace(
            item,
            source_name=name,
            licence=item.licence or config.licence,
            split=item.split or config.split,
            media=item.media if config.media == "auto" else config.media,
        )


def source_from_path(path: str) -> SourceConfig:
    """Guess what lies at a path or address: the last registered kind that recognises it.

    Raises:
        ConfigError: a file of no known kind.
    """
    for reader in reversed(READERS.values()):
        source = reader.recognise(path)
        if source is not None:
            return source
    raise ConfigError(
        f"don't know what {path} is",
        legal="a folder, .csv .tsv .jsonl .parquet .tar, a .txt list of URLs, an http address",
    )
