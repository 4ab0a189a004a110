"""Is the declared recall met? A sample of queries with exact answers decides, by its 95 % lower bound."""

from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.memory.config import IndexConfig
from pipeline.memory.recall import Exact, hits, lower_bound
from pipeline.memory.sample import Growth, Sample, answered, grown
from pipeline.memory.vectors import Setting

SPOT_CHECKS = 20
"""Kept answers of a grown memory that are asked for again, of each kind of query."""
MAX_SPOT_LOSS = 0.005
"""Recall that the answers asked for again may lack: one hit of the 200 of 20 queries."""


def verify(
    table: Any, column: str, config: IndexConfig, setting: Setting, sample: Sample
) -> tuple[dict[str, Any], Sample] | None:
    """(the certificate's facts, the sample with the index's answers) if it meets the declared recall."""
    asked = {query: answered(table, column, exact, setting, k=config.k) for query, exact in sample.items()}
    facts = judge(config, setting, asked)
    return None if facts is None else (facts, asked)


def judge(config: IndexConfig, setting: Setting, sample: Sample) -> dict[str, Any] | None:
    """The certificate's facts of answers that meet the declared recall; else None."""
    found = {}
    for query, exact in sample.items():
        recalls = recalls_of(exact, k=config.k)
        mean = float(np.mean(recalls)) if len(recalls) else 0.0
        # A scan of everything is exact by construction: the sample only checks that it is one.
        lower = mean if setting.kind == "flat" and mean > 1 - 1e-3 else lower_bound(recalls)
        if lower < config.recall:
            return None
        found[query] = {
            "recall": round(mean, 6),
            "recall_lower_95": round(lower, 6),
            "queries": len(recalls),
        }
    return {
        "setting": asdict(setting),
        "k": config.k,
        "declared_recall": config.recall,
        "by_query": found,
    }


def verify_grown(
    table: Any, column: str, config: IndexConfig, setting: Setting, growth: Growth, *, seed: int
) -> tuple[dict[str, Any], Sample] | None:
    """Hold the index of a memory that grew to its recall, with its kept settings and its kept sample.

    Only what is new is asked for: the kept answers are merged with the new documents, which the index
    doesn't hold and LanceDB therefore scans. That it does is checked on a few; where they differ, and
    where no answers were kept, all queries are asked.
    """
    if column not in growth.kept:
        return None
    sample = grown(table, column, config, setting, growth, seed=seed)
    if all(_is_as_kept(table, column, config, setting, exact) for exact in sample.values()):
        facts = judge(config, setting, sample)
        return None if facts is None else (facts, sample)
    return verify(table, column, config, setting, sample)


def _is_as_kept(table: Any, column: str, config: IndexConfig, setting: Setting, exact: Exact) -> bool:
    if exact.answers is None or not len(exact):
        return False
    some = exact.take(slice(0, SPOT_CHECKS))  # the sample lies in random order
    again = recalls_of(answered(table, column, some, setting, k=config.k), k=config.k)
    kept = recalls_of(some, k=config.k)
    return float(np.mean(again)) >= float(np.mean(kept)) - MAX_SPOT_LOSS


def recalls_of(exact: Exact, *, k: int) -> np.ndarray:
    """Recall of each query by the answers that the sample carries."""
    assert exact.answers is not None
    return hits(exact, exact.answers.lists(), k=k)
