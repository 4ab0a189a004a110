"""Redrive: try again what a crawl lost to faults that a retry may cure; everything else stays as it is.

The result is a crawl's output like any other, in a folder of its own: rows that were good, filtered or
hopeless are carried over byte for byte, retried parents give new rows with `attempt` one higher.
"""

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

from pydantic import ValidationError

from infra.certificate import Certificate, require_certificate
from infra.claim import CONFIG_FILE, read_job_config
from infra.config import Location, describe, refuse_imports
from infra.errors import ConfigError
from infra.storage import absolute, join
from pipeline.clips.crawl import JOB, CrawlConfig, Worker, num_workers, write_table
from pipeline.clips.fetch.web import FetchConfig
from pipeline.clips.sources import Cut, Item
from pipeline.clips.table import Row
from pipeline.job import JobConfig, run_job, run_units
from pipeline.journal import Receipts, Unit
from pipeline.schema import RETRIABLE, Status, content_id
from pipeline.shards import open_part


class RedriveConfig(JobConfig):
    """Which crawl is tried again, and how patiently. `out` gets a whole table, retried rows in their places."""

    clips: Location
    """Certified output of a crawl (or of an earlier redrive)."""
    fetch: FetchConfig | None = None
    """How to fetch; None = as the crawl did."""


def check(config: RedriveConfig) -> tuple[Certificate, CrawlConfig]:
    """Preflight: the crawl is whole, its config is there, and the output is another folder.

    Raises:
        ConfigError: which of these is not so.
    """
    certificate = require_certificate(config.clips, job=JOB, made_by="vimi-data crawl")
    if config.out == config.clips:
        raise ConfigError("the output is the input", cure="choose another --out")
    return certificate, _crawl_config(config)


def run(config: RedriveConfig) -> Certificate:
    """Retry the rows whose status says that it may help, or continue a redrive that was stopped.

    Raises:
        ConfigError: see `check`.
    """
    source, crawl = check(config)
    inputs = {"clips": source.content_hash()}
    files = [join(config.clips, file.path) for file in source.files]

    def work() -> Receipts:
        workers = num_workers(crawl)
        worker = partial(Worker, crawl, workers)
        units = make_units(files)
        return run_units(config.out, units, worker, what="redrive", num_workers=workers, units_per_task=4)

    def finish(receipts: Receipts) -> Certificate:
        facts = {"units": len(receipts), "retried": len(receipts)}
        return write_table(crawl, partial(merged, files, receipts), inputs=inputs, facts=facts)

    return run_job(JOB, config, inputs, work=work, finish=finish)


def _crawl_config(config: RedriveConfig) -> CrawlConfig:
    """The crawl's own config, with the output and the manners of this job; any share of rows may fail."""
    saved = crawl_config(config.clips)
    changes: dict[str, Any] = {"fetch": config.fetch} if config.fetch is not None else {}
    here = {"out": config.out, "ray": config.ray, "num_workers": config.num_workers, "max_failed_frac": 1.0}
    return saved.model_copy(update={**here, **changes})


def crawl_config(clips: str) -> CrawlConfig:
    """What a table of clips was crawled by, also if it was redriven or captioned since.

    Raises:
        ConfigError: it is of another version, or asks for imports that aren't allowed.
    """
    place, values = join(clips, CONFIG_FILE), read_job_config(clips)
    if "sources" not in values:  # a later job's; so is the table that it read
        saved = crawl_config(absolute(values["clips"]))
        fetch = values.get("fetch")
        return saved if fetch is None else saved.model_copy(update={"fetch": FetchConfig.model_validate(fetch)})
    try:
        saved = CrawlConfig.model_validate(values)
    except ValidationError as error:  # of another version, or its reader is not registered here
        raise ConfigError(*describe(error, CrawlConfig, place), cure="crawl again") from None
    refuse_imports(saved.filters.plugins, of=place)
    return saved


def read_parents(files: list[str]) -> Iterator[list[Row]]:
    """Rows of a crawl, grouped by parent, in order; streamed."""

    def rows() -> Iterator[Row]:
        for file in files:
            with open_part(file) as table:
                for batch in table.iter_batches(batch_size=2048):
                    yield from batch.to_pylist()

    for _, group in groupby(rows(), key=lambda row: row["source_uri"]):
        yield list(group)


def make_units(files: list[str]) -> Iterator[Unit]:
    """One unit for each parent that has a row to be tried again."""
    for position, parent in enumerate(read_parents(files)):
        if any(row["status"] in RETRIABLE for row in parent):
            attempt = max(row["attempt"] or 1 for row in parent) + 1
            payload = {"items": [_item(parent).to_json()], "attempt": attempt}
            yield Unit(_unit_id(position, parent), payload)


def merged(files: list[str], receipts: Receipts) -> Iterator[Row]:
    """The crawl's rows in their order, with those of the retried parents replaced."""
    for position, parent in enumerate(read_parents(files)):
        if any(row["status"] in RETRIABLE for row in parent):
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
    """The clip as listed, without a model's words; one that failed before its range was known ends at 0."""
    hopeless = Status(row["status"]) in (Status.BAD_CAPTION, Status.BAD_RANGE, Status.BAD_ROW)
    ranged = row["end_s"] > 0
    return Cut(
        row.get("caption_found") if row.get("caption_model") else row["caption"],
        row["start_s"] if ranged else None,
        row["end_s"] if ranged else None,
        row["status"] if hopeless else None,
        row["error"] if hopeless else None,
    )
