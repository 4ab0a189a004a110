"""After the last commit: compact, index, verify; what a growing memory may leave for later."""

import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from pipeline.memory.config import IndexConfig
from pipeline.memory.index import build_id_index, build_text_index
from pipeline.memory.sample import Growth, Sample
from pipeline.memory.tune import build_vector_index
from pipeline.memory.vectors import setting_of
from pipeline.memory.verify import verify_grown


@dataclass
class Finished:
    """What became of the indexes."""

    facts: dict[str, Any] = field(default_factory=dict)
    """For the certificate, by column: setting and measured recall."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Seconds and bytes."""
    samples: dict[str, Sample] = field(default_factory=dict)
    """What each column was verified on."""


def finish(
    table: Any,
    config: IndexConfig,
    *,
    seed: int,
    before: dict[str, Any] | None = None,
    growth: Growth | None = None,
) -> Finished:
    """Index the table and hold it to the declared recall.

    Args:
        table: LanceDB table at its latest version, all documents committed.
        config: what the indexes must reach.
        seed: of the verifying samples.
        before: facts of the certificate of the memory that grew; None = a first build.
        growth: its kept samples and what is new; without, it is indexed anew.

    Raises:
        DataError: the declared recall isn't met.
    """
    if before is not None and growth is not None and unindexed_frac(table) <= config.retune_frac:
        kept = _keep(table, config, before, growth, seed=seed)
        if kept is not None:
            return kept
    done, started_s = Finished(), time.monotonic()
    compact(table, tagged=before is not None)
    build_id_index(table)
    done.measured["compact_s"] = time.monotonic() - started_s
    started_s = time.monotonic()
    build_text_index(table)
    done.measured["text_index_s"] = time.monotonic() - started_s
    for column in config.columns:
        built = build_vector_index(table, column, config, seed=seed)
        done.facts[column], done.measured[column], done.samples[column] = built
    return done


def _keep(
    table: Any, config: IndexConfig, before: dict[str, Any], growth: Growth, *, seed: int
) -> Finished | None:
    """The old indexes with their settings, verified on the grown table; None if one falls short."""
    started_s, done = time.monotonic(), Finished()
    for column in config.columns:
        setting = setting_of(before, column)
        verified = setting and verify_grown(table, column, config, setting, growth, seed=seed)
        if not verified:
            return None
        done.facts[column], done.samples[column] = verified
    done.measured["verify_s"] = time.monotonic() - started_s
    return done


def compact(table: Any, *, tagged: bool) -> None:
    """Merge small fragments into large ones.

    Old files are deleted only when no tag can point at them; LanceDB refuses to delete tagged versions.
    """
    ages = timedelta(milliseconds=1) if not tagged else timedelta(days=36500)
    table.optimize(cleanup_older_than=ages, delete_unverified=False)


def unindexed_frac(table: Any) -> float:
    """The largest share of rows that an index of the table lacks; 1 when an index is missing."""
    rows = table.count_rows()
    found = [i for i in table.list_indices() if i.columns != ["doc_id"]]
    if not found:
        return 1.0
    return max((i.num_unindexed_rows or 0) / max(rows, 1) for i in found)
