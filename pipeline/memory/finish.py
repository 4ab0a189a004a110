"""After the last commit: compact, index, verify; what a growing memory may leave for later."""

import time
from datetime import timedelta
from typing import Any

from pipeline.memory.index import (
    IndexConfig,
    build_id_index,
    build_text_index,
    build_vector_index,
    verify_vector_index,
)
from pipeline.memory.vectors import setting_of

MAX_UNINDEXED_FRAC = 0.1
"""A grown table is compacted and its indexes are built anew when more than this share of its rows lies
outside them. Until then LanceDB scans those rows beside the index (exactly): small additions stay small
work, and each document is indexed again about ten times in the life of a table that grows forever."""


def finish(
    table: Any, config: IndexConfig, *, seed: int, before: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Index the table and hold it to the declared recall.

    Args:
        table: LanceDB table at its latest version, all documents committed.
        config: what the indexes must reach.
        seed: of the verifying samples.
        before: facts of the certificate of the memory that grew; None = a first build.

    Returns:
        (facts for the certificate, by column; what was measured: seconds and bytes).

    Raises:
        DataError: the declared recall isn't met.
    """
    if before is not None and unindexed_frac(table) <= MAX_UNINDEXED_FRAC:
        kept = _keep(table, config, before, seed=seed)
        if kept is not None:
            return kept
    started_s = time.monotonic()
    compact(table, tagged=before is not None)
    build_id_index(table)
    measured: dict[str, Any] = {"compact_s": time.monotonic() - started_s}
    started_s = time.monotonic()
    build_text_index(table)
    measured["text_index_s"] = time.monotonic() - started_s
    facts: dict[str, Any] = {}
    for column in config.columns:
        facts[column], measured[column] = build_vector_index(table, column, config, seed=seed)
    return facts, measured


def _keep(
    table: Any, config: IndexConfig, before: dict[str, Any], *, seed: int
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The old indexes with their settings, verified on the grown table; None if one falls short."""
    started_s = time.monotonic()
    facts = {}
    for column in config.columns:
        setting = setting_of(before, column)
        verified = setting and verify_vector_index(table, column, config, setting, seed=seed)
        if not verified:
            return None
        facts[column] = verified
    return facts, {"verify_s": time.monotonic() - started_s}


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
