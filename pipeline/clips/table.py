"""Receipts become a table: duplicates marked, parts written, failures counted against a ceiling."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

from infra.errors import TooManyFailuresError
from infra.storage import Certificate, FileEntry, join, write_certificate
from pipeline.clips.config import CrawlConfig
from pipeline.clips.duplicates import find_duplicates
from pipeline.clips.parent import Row
from pipeline.schema import CLIPS, Status
from pipeline.shards import shard_name, write_shard

NOT_IDENTITY = {"max_failed_frac", "timeout_s", "memory_bytes", "media"}
"""Fields that decide whether and how the job ends, not what a good row holds."""


class FailureCeiling:
    """Stops a job that has gone wrong, once enough rows have been seen to say so."""

    def __init__(self, max_failed_frac: float, min_rows: int = 500) -> None:
        self.max_failed_frac, self.min_rows = max_failed_frac, min_rows
        self.statuses: Counter[str] = Counter()

    def __call__(self, statuses: dict[str, int]) -> None:
        self.statuses.update(statuses)
        if self.statuses.total() >= self.min_rows:
            self.check()

    def count(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The same rows, counted as they pass."""
        for row in rows:
            self.statuses[row["status"]] += 1
            yield row

    def check(self) -> None:
        dead = {s: n for s, n in sorted(self.statuses.items()) if Status(s).is_dead}
        total = self.statuses.total()
        if sum(dead.values()) > self.max_failed_frac * total:
            raise TooManyFailuresError(
                f"crawl: {sum(dead.values())} of {total} rows failed ({dead}), more than max_failed_frac="
                f"{self.max_failed_frac:g}; look at the reasons, then run again with a higher ceiling"
            )


def write_clips(
    config: CrawlConfig,
    rows: Callable[[], Iterator[Row]],
    *,
    inputs: dict[str, str],
    facts: dict[str, Any],
    started_s: float,
) -> Certificate:
    """Rows in unit order (iterated twice) -> Parquet parts, then the certificate."""
    duplicates = find_duplicates(rows(), config.filters.near_duplicate_bits)
    ceiling = FailureCeiling(config.max_failed_frac)
    files: list[FileEntry] = []
    for number, part in enumerate(_parts(_mark(rows(), duplicates), config.rows_per_part)):
        path = join(config.out, shard_name(number))
        files.append(write_shard(path, ceiling.count(part), CLIPS, row_group_rows=8192))
    ceiling.check()
    counts = {Status(status): count for status, count in sorted(ceiling.statuses.items())}
    certificate = Certificate(
        job="crawl",
        config_hash=config.hash(exclude={"out", "ray", "num_workers", *NOT_IDENTITY}),
        num_in=sum(counts.values()),
        num_out=counts.get(Status.OK, 0),
        filtered={s.value: n for s, n in counts.items() if s.is_filtered},
        dead={s.value: n for s, n in counts.items() if s.is_dead},
        files=files,
        inputs=inputs,
        facts=facts,
        created_at_s=time.time(),
        wall_s=time.time() - started_s,
    )
    write_certificate(config.out, certificate)
    return certificate


def _mark(rows: Iterator[Row], duplicates: dict[int, tuple[Status, str]]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        fate = duplicates.get(number)
        yield {**row, "status": fate[0].value, "error": fate[1]} if fate else row


def _parts(rows: Iterator[Row], size: int) -> Iterator[Iterator[Row]]:
    """Runs of `size` rows, each to be consumed before the next."""
    for first in rows:
        yield chain([first], islice(rows, size - 1))
