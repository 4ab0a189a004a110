"""Indexes of a committed table: ids, BM25, and vector indexes that are held to a declared recall.

LanceDB's defaults reach a recall@10 of 0.37 on 100,000 vectors and say nothing (measured). Here the index is
chosen from the table's size, its search settings are tuned on one sample of queries, and the result is
*verified* on another: a build whose 95 % lower bound lies under the declared recall fails, and says what would
have met it. A memory that grew by a little keeps its indexes and is only verified.
"""

import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np

from infra.errors import ConfigError, DataError
from pipeline.memory.recall import IndexConfig, K
from pipeline.memory.retrieve.analysis import Analysis, lance_options
from pipeline.memory.sample import Growth, Sample, answered, draw, recalls_of, verify, verify_grown
from pipeline.memory.vectors import Setting, setting_of

EXACT_ROWS = 20_000
"""Tables up to this size are searched exactly (kind auto). Ours: a scan then takes milliseconds."""
RETUNE_FRAC = 0.1
"""A memory that grew is compacted and indexed and tuned anew when more than this share of its rows lies outside
its indexes. Until then LanceDB scans those rows beside them (exactly) and only the recall is verified: small
additions stay small work. Ours: a document is indexed again about ten times in the life of a growing table."""
ATTEMPTS = 3
"""Settings of one index that may be put to the test, each on a sample of its own, stronger each time."""


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
    before: dict[str, Any] | None = None,
    growth: Growth | None = None,
) -> Finished:
    """Index the table and hold it to the declared recall.

    Args:
        table: LanceDB table at its latest version, all documents committed.
        config: what the indexes must reach.
        before: facts of the certificate of the memory that grew; None = a first build.
        growth: its kept samples and what is new; without, it is indexed anew.

    Raises:
        DataError: the declared recall isn't met.
    """
    if before is not None and growth is not None and unindexed_frac(table) <= RETUNE_FRAC:
        kept = _keep(table, config, before, growth)
        if kept is not None:
            return kept
    done, started_s = Finished(), time.monotonic()
    compact(table, tagged=before is not None)
    build_id_index(table)
    done.measured["compact_s"] = time.monotonic() - started_s
    started_s = time.monotonic()
    build_text_index(table, config.analysis)
    done.measured["text_index_s"] = time.monotonic() - started_s
    for column in config.columns:
        built = build_vector_index(table, column, config)
        done.facts[column], done.measured[column], done.samples[column] = built
    return done


def _keep(table: Any, config: IndexConfig, before: dict[str, Any], growth: Growth) -> Finished | None:
    """The old indexes with their settings, verified on the grown table; None if one falls short."""
    started_s, done = time.monotonic(), Finished()
    for column in config.columns:
        setting = setting_of(before, column)
        verified = setting and verify_grown(table, column, config, setting, growth)
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


def build_vector_index(
    table: Any, column: str, config: IndexConfig
) -> tuple[dict[str, Any], dict[str, float], Sample]:
    """Build, tune and verify the index of one embedding column.

    Returns:
        (what the certificate says: setting and recall, what was measured: times and sizes, the sample
        that it was verified on).

    Raises:
        DataError: the declared recall isn't met; says what would meet it.
    """
    rows, dim = table.count_rows(), int(table.schema.field(column).type.list_size)
    best: tuple[float, Setting] | None = None
    for number, first in enumerate(kinds(config, rows, dim)):
        started_s = time.monotonic()
        make_index(table, column, first)
        build_s = time.monotonic() - started_s
        settings = ladder(first)
        for attempt in range(ATTEMPTS):
            tuning, held_out = draw(table, column, config, first, seed=number * ATTEMPTS + attempt)
            setting, tuned = _tune(table, column, config, settings, tuning)
            best = max(best or (tuned, setting), (tuned, setting), key=lambda found: found[0])
            if tuned < config.recall:
                break
            verified = verify(table, column, config, setting, held_out)
            if verified is not None:
                facts, held_out = verified
                measured = {"build_s": build_s, "index_bytes": float(index_bytes(table, column))}
                return facts, measured, held_out
            settings = settings[settings.index(setting) + 1 :]
            if not settings:
                break
    assert best is not None
    reached, setting = best
    budget = config.max_index_bytes // len(config.columns)
    raise DataError(
        f"recall@{K} of {column}: {reached:.4f} with {_words(setting)}, declared {config.recall}; "
        f"would meet it: kind=flat (exact; reads {Setting('flat').bytes_of(rows, dim):,} bytes a query), "
        f"recall={max(reached - 0.01, 0):.2f}, or a larger max_index_bytes ({budget:,} for this column)"
    )


def _tune(
    table: Any, column: str, config: IndexConfig, settings: list[Setting], samples: Sample
) -> tuple[Setting, float]:
    """The first setting, cheapest first, whose worst mean recall leaves room for the bound; else the best."""
    goal = config.recall + (1 - config.recall) / 2
    best = (settings[0], -1.0)
    for setting in settings:
        worst = min(
            float(np.mean(recalls_of(answered(table, column, exact, setting)))) for exact in samples.values()
        )
        if worst > best[1]:
            best = (setting, worst)
        if worst >= goal:
            return setting, worst
    return best


def _words(setting: Setting) -> str:
    return " ".join(f"{k}={v}" for k, v in asdict(setting).items() if v)


def build_text_index(table: Any, analysis: Analysis = "english") -> None:
    """BM25 over the documents' text: LanceDB's native full-text index."""
    from lancedb.index import FTS

    drop_index(table, "text")
    table.create_index("text", config=FTS(**lance_options(analysis)))  # pyright: ignore[reportArgumentType]


def build_id_index(table: Any) -> None:
    """An index of the ids: upserts and look-ups without a scan, and new columns without rewriting old ones."""
    from lancedb.index import BTree

    drop_index(table, "doc_id")
    table.create_index("doc_id", config=BTree())


def make_index(table: Any, column: str, setting: Setting) -> None:
    """Build the index of this kind, in place of the one that is there."""
    from lancedb import index

    rows = table.count_rows()
    drop_index(table, column)
    config = {
        "flat": lambda: index.IvfFlat(distance_type="cosine", num_partitions=max(1, rows // 8192)),
        "rq": lambda: index.IvfRq(distance_type="cosine", num_bits=setting.num_bits),
        "pq": lambda: index.IvfPq(distance_type="cosine", num_bits=8),
        "hnsw": lambda: index.HnswSq(distance_type="cosine"),
    }[setting.kind]()
    table.create_index(column, config=config)


def drop_index(table: Any, column: str) -> None:
    for found in table.list_indices():
        if found.columns == [column]:
            table.drop_index(found.name)


def index_bytes(table: Any, column: str) -> int:
    return sum(i.size_bytes or 0 for i in table.list_indices() if i.columns == [column])


def kinds(config: IndexConfig, rows: int, dim: int) -> list[Setting]:
    """Indexes of one column to try, cheapest first, of those that fit its share of `max_index_bytes`.

    Raises:
        ConfigError: none fits; says what would.
    """
    if config.kind == "flat" or (config.kind == "auto" and rows <= EXACT_ROWS):
        return [Setting("flat")]
    tries = {
        "rq": [Setting("rq", num_bits=1), Setting("rq", num_bits=4)],
        "hnsw": [Setting("hnsw")],
        "pq": [Setting("pq", num_bits=8)],
    }
    chosen = tries["rq"] + tries["hnsw"] if config.kind == "auto" else tries[config.kind]
    if dim % 8:
        chosen = [s for s in chosen if s.kind != "rq"]  # RaBitQ packs 8 dimensions to a byte
    if not chosen:
        raise ConfigError(f"index.kind=rq of {dim} dimensions", legal="a multiple of 8", cure="index.kind=auto")
    budget = config.max_index_bytes // max(len(config.columns), 1)
    found = [s for s in chosen if s.bytes_of(rows, dim) <= budget]
    if not found:
        least = min(s.bytes_of(rows, dim) for s in chosen)
        raise ConfigError(
            f"no {config.kind} index of {rows:,} documents x {dim} fits {budget:,} bytes, a column's share of "
            f"index.max_index_bytes={config.max_index_bytes:,}",
            cure=f"index.max_index_bytes of at least {least * len(config.columns):,}, or index.kind=flat "
            "(no index in memory)",
        )
    return found


def ladder(base: Setting) -> list[Setting]:
    """Search settings of one index, cheapest first."""
    dials = {
        "flat": [(0, 0, 0)],
        "rq": [(n, r, 0) for r in (2, 5, 10, 20, 50, 100) for n in (16, 64, 256)],
        "pq": [(n, r, 0) for r in (5, 10, 20, 50, 100) for n in (16, 64, 256)],
        "hnsw": [(16, r, e) for r in (2, 10, 30) for e in (64, 200, 500)],
    }[base.kind]
    return [Setting(base.kind, base.num_bits, n, r, e) for n, r, e in dials]
