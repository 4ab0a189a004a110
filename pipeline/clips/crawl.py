"""Crawl: corpora -> clips. Every row keeps its fate; a unit of work is a parent with all its clips.

sources -> items (a parent and its clips) -> units -> fetch -> inspect in a child process -> receipts
-> in unit order: exact and near duplicates -> clips/part-*.parquet -> certificate
"""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from infra.cluster import ray_session
from infra.errors import ConfigError
from infra.storage import Certificate, absolute, join
from pipeline.clips.config import CrawlConfig
from pipeline.clips.fetch.fetcher import Fetcher
from pipeline.clips.filters import load_plugins
from pipeline.clips.parent import InspectConfig, Row, dead_rows
from pipeline.clips.sources import Item, Reader, open_source, read_items
from pipeline.clips.sources.base import is_url
from pipeline.clips.sources.page import PageReader
from pipeline.clips.table import NOT_IDENTITY, FailureCeiling, write_clips
from pipeline.job import Receipt, Unit, open_job, run_units
from pipeline.media.isolate import Isolated, IsolatedCrashError, IsolatedTimeoutError
from pipeline.schema import Status, content_id


def check(config: CrawlConfig) -> list[Reader]:
    """Door checks, before Ray starts: every corpus exists, is readable and not empty.

    Raises:
        ConfigError: which corpus is wrong, and how.
    """
    if not config.sources:
        raise ConfigError("no sources", cure="name a folder, a table, a tar, a URL list or a page")
    load_plugins(config.filters.plugins)
    readers = []
    for source in config.sources:
        reader = open_source(source)
        if not isinstance(reader, PageReader) and next(read_items(source, reader), None) is None:
            raise ConfigError(f"{source.path} lists no video or picture", cure="check its path and kind")
        readers.append(reader)
    return readers


def run(config: CrawlConfig) -> Certificate:
    """Crawl, or continue a crawl that was stopped; a finished one is recognised and left alone.

    Raises:
        ConfigError: refused at the door.
        TooManyFailuresError: more dead rows than `max_failed_frac`; the reasons are counted.
    """
    config = config.model_copy(update={"out": absolute(config.out)})
    readers = check(config)
    named = enumerate(zip(config.sources, readers, strict=True))
    inputs = {f"{n}:{source.kind}": reader.fingerprint() for n, (source, reader) in named}
    started_s = time.time()
    done = open_job(config.out, job="crawl", config=config, inputs=inputs, hash_exclude=NOT_IDENTITY)
    if done:
        return done
    prepare_pages(config, readers)
    units = partial(make_units, config, readers)
    with ray_session(config.ray):
        receipts = run_units(
            config.out,
            units(),
            partial(Worker, config, num_workers(config)),
            what="crawl",
            num_workers=config.num_workers,
            units_per_task=16,
            watch=FailureCeiling(config.max_failed_frac),
        )

    def rows() -> Iterator[Row]:
        for _, receipt in receipts.in_order(units()):
            yield from receipt["rows"]

    facts = {"units": len(receipts)}
    certificate = write_clips(config, rows, inputs=inputs, facts=facts, started_s=started_s)
    receipts.clear()
    return certificate


def prepare_pages(config: CrawlConfig, readers: list[Reader]) -> None:
    """Look through web pages once: what they showed is the corpus from then on."""
    pages = [reader for reader in readers if isinstance(reader, PageReader)]
    if not pages:
        return
    fetcher = Fetcher(config.fetch, config.media_folder)
    try:
        for reader in pages:
            reader.prepare(fetcher, join(config.out, "pages"))
    finally:
        fetcher.close()
    if not any(next(reader.items(), None) for reader in readers):
        raise ConfigError("no page shows a video or a picture", cure="check the address, or raise depth")


def make_units(config: CrawlConfig, readers: list[Reader]) -> Iterator[Unit]:
    """One unit a local video; pictures and addresses travel in lots, which share a connection."""
    position = 0
    for source, reader in zip(config.sources, readers, strict=True):
        for lot in _lots(read_items(source, reader)):
            items = [item.to_json() for item in lot]
            yield Unit(content_id(position, *(item.uri for item in lot)), {"items": items})
            position += 1


def _lots(items: Iterator[Item], size: int = 32) -> Iterator[list[Item]]:
    lot: list[Item] = []
    for item in items:
        alone = item.media == "video" and not is_url(item.uri)
        if lot and (alone or len(lot) == size):
            yield lot
            lot = []
        lot.append(item)
        if alone:
            yield lot
            lot = []
    if lot:
        yield lot


class Worker:
    """Lives in a Ray worker: fetches, then hands each parent to a child process that may die."""

    def __init__(self, config: CrawlConfig, workers: int = 1) -> None:
        self.fetcher: Fetcher | None = None
        self.make_fetcher = partial(Fetcher, config.fetch, config.media_folder, workers=workers)
        standalone = join(config.out, "standalone") if config.transcode else None
        inspect = InspectConfig(shots=config.shots, filters=config.filters, standalone=standalone)
        self.settings = inspect.model_dump_json()
        self.child = Isolated(timeout_s=config.timeout_s, memory_bytes=config.memory_bytes)

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        items = payload["items"]
        urls = [item["uri"] for item in items if is_url(item["uri"]) and not item["status"]]
        fetched = dict(zip(urls, self.fetch(urls), strict=True))
        rows: list[Row] = []
        for item in items:
            found = fetched.get(item["uri"]) or {"local_uri": item["uri"]}
            rows += self.inspect(item, {**found, "attempt": payload.get("attempt", 1)})
        return {"rows": rows, "notes": dict(Counter(row["status"] for row in rows))}

    def close(self) -> None:
        self.child.close()
        if self.fetcher is not None:
            self.fetcher.close()

    def fetch(self, urls: list[str]) -> list[dict[str, Any]]:
        if not urls:
            return []
        self.fetcher = self.fetcher or self.make_fetcher()
        return self.fetcher.fetch_all(urls)

    def inspect(self, item: dict[str, Any], found: dict[str, Any]) -> list[Row]:
        """The rows of one parent; one whose child hangs, or dies each time, is a row with that status."""
        try:
            return self.child.call("pipeline.clips.parent:inspect_parent", item, found, self.settings)
        except IsolatedTimeoutError as error:
            return dead_rows(Item.from_json(item), found, Status.TIMEOUT, str(error))
        except IsolatedCrashError as error:
            return dead_rows(Item.from_json(item), found, Status.CRASHED, str(error))


def num_workers(config: CrawlConfig) -> int:
    """How many workers share a host's rate."""
    import ray

    return config.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
