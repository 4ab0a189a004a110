"""Redrive: try again what a crawl lost to faults that a retry may cure; everything else stays as it is.

The result is a crawl's output like any other, in a folder of its own: rows that were good, filtered or
hopeless are carried over byte for byte, retried parents give new rows with `attempt` one higher.
"""

import time
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow.parquet as pq
from pydantic import Field

from infra.cluster import RayConfig, ray_session
from infra.config import Config
from infra.errors import ConfigError
from infra.storage import Certificate, absolute, exists, filesystem, join, require_certificate
from pipeline.clips.config import CrawlConfig
from pipeline.clips.crawl import Worker, num_workers
from pipeline.clips.fetch.config import FetchConfig
from pipeline.clips.parent import Row
from pipeline.clips.sources import Cut, Item
from pipeline.clips.table import NOT_IDENTITY, FailureCeiling, write_clips
from pipeline.job import Receipts, Unit, open_job, run_units
from pipeline.schema import RETRIABLE, Status, content_id


class RedriveConfig(Config):
    """Which rows of which crawl are tried again, and how patiently."""

    clips: str
    """Certified output of a crawl (or of an earlier redrive)."""
    out: str
    """Output folder: a whole table, with the retried rows in their places."""
    statuses: tuple[Status, ...] = tuple(sorted(RETRIABLE))
    """Fates that are tried again; by default those that a retry may cure."""
    fetch: FetchConfig | None = None
    """How to fetch; None = as the crawl did."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Time that one parent may take; None = as the crawl's."""
    max_failed_frac: float = Field(default=1.0, ge=0, le=1)
    """Ceiling on dead rows as a share of all rows, those of the crawl included."""
    ray: RayConfig = RayConfig()
    num_workers: int | None = Field(default=None, ge=1)
    """Workers at once; None = as many as the CPUs allow."""


def check(config: RedriveConfig) -> tuple[Certificate, CrawlConfig]:
    """Door checks: the crawl is whole, its config is there, and the output is another folder.

    Raises:
        ConfigError: which of these is not so.
    """
    certificate = require_certificate(config.clips, job="crawl", made_by="vimi-data crawl")
    if absolute(config.out) == absolute(config.clips):
        raise ConfigError("the output is the input", cure="choose another --out")
    return certificate, _crawl_config(config)


def run(config: RedriveConfig) -> Certificate:
    """Retry, or continue a redrive that was stopped.

    Raises:
        ConfigError: refused at the door.
        TooManyFailuresError: more dead rows than `max_failed_frac`.
    """
    config = config.model_copy(update={"clips": absolute(config.clips), "out": absolute(config.out)})
    source, crawl = check(config)
    started_s = time.time()
    inputs = {"clips": source.content_hash()}
    done = open_job(config.out, job="crawl", config=config, inputs=inputs, hash_exclude=NOT_IDENTITY)
    if done:
        return done
    files = [join(config.clips, file.path) for file in source.files]
    units = partial(make_units, files, frozenset(config.statuses))
    with ray_session(config.ray):
        receipts = run_units(
            config.out,
            units(),
            partial(Worker, crawl, num_workers(crawl)),
            what="redrive",
            num_workers=config.num_workers,
            units_per_task=4,
            watch=FailureCeiling(1.0),
        )
    rows = partial(merged, files, frozenset(config.statuses), receipts)
    facts = {"units": len(receipts), "retried": len(receipts)}
    certificate = write_clips(crawl, rows, inputs=inputs, facts=facts, started_s=started_s)
    receipts.clear()
    return certificate


def _crawl_config(config: RedriveConfig) -> CrawlConfig:
    """The crawl's own config, with the patience and the output of this job."""
    place = join(absolute(config.clips), "config.yaml")
    if not exists(place):
        raise ConfigError(f"{config.clips} has no config.yaml", cure="give the folder that a crawl wrote")
    saved = _load(place)
    changes: dict[str, Any] = {
        "out": absolute(config.out),
        "ray": config.ray,
        "num_workers": config.num_workers,
        "max_failed_frac": config.max_failed_frac,
    }
    if config.fetch is not None:
        changes["fetch"] = config.fetch
    if config.timeout_s is not None:
        changes["timeout_s"] = config.timeout_s
    return saved.model_copy(update=changes)


def _load(place: str) -> CrawlConfig:
    import yaml

    from infra.storage import read_bytes

    values = yaml.safe_load(read_bytes(place))
    if "sources" in values:
        return CrawlConfig.model_validate(values)
    return _crawl_config(RedriveConfig.model_validate(values))  # a redrive of a redrive


def read_parents(files: list[str]) -> Iterator[list[Row]]:
    """Rows of a crawl, grouped by parent, in order; streamed."""

    def rows() -> Iterator[Row]:
        for file in files:
            fs, path = filesystem(file)
            with pq.ParquetFile(path, filesystem=fs) as table:
                for batch in table.iter_batches(batch_size=2048):
                    yield from batch.to_pylist()

    for _, group in groupby(rows(), key=lambda row: row["source_uri"]):
        yield list(group)


def make_units(files: list[str], statuses: frozenset[Status]) -> Iterator[Unit]:
    """One unit for each parent that has a row to be tried again."""
    for position, parent in enumerate(read_parents(files)):
        if any(row["status"] in statuses for row in parent):
            attempt = max(row["attempt"] or 1 for row in parent) + 1
            payload = {"items": [_item(parent).to_json()], "attempt": attempt}
            yield Unit(_unit_id(position, parent), payload)


def merged(files: list[str], statuses: frozenset[Status], receipts: Receipts) -> Iterator[Row]:
    """The crawl's rows in their order, with those of the retried parents replaced."""
    for position, parent in enumerate(read_parents(files)):
        if any(row["status"] in statuses for row in parent):
            yield from receipts.get(_unit_id(position, parent))["rows"]
        else:
            yield from parent


def _unit_id(position: int, parent: list[Row]) -> str:
    return content_id(position, parent[0]["source_uri"])


def _item(parent: list[Row]) -> Item:
    """The parent as its source listed it."""
    first = parent[0]
    return Item(
        first["source_uri"],
        "image" if first["media"] == "image" else "auto",
        tuple(_cut(row) for row in parent),
        first["split"],
        first["licence"],
        first["source_name"],
    )


def _cut(row: Row) -> Cut:
    """The clip as listed: a row that failed before its range was known has an end of 0."""
    hopeless = Status(row["status"]) in (Status.BAD_CAPTION, Status.BAD_RANGE, Status.BAD_ROW)
    ranged = row["end_s"] > 0
    return Cut(
        row["caption"],
        row["start_s"] if ranged else None,
        row["end_s"] if ranged else None,
        row["status"] if hopeless else None,
        row["error"] if hopeless else None,
    )
