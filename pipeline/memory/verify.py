"""Is the declared recall met? A sample of queries with exact answers decides, by its 95 % lower bound."""

from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.memory.config import IndexConfig
from pipeline.memory.recall import Exact, hits, lower_bound
from pipeline.memory.sample import Growth, Sample, grown
from pipeline.memory.vectors import Setting, vector_search

FIRST_LOOK = 300
"""Queries after which the verification of a grown memory may stop if they suffice; else all are asked.
Two looks are within the three that `recall.Z_95` allows for."""


def verify(
    table: Any, column: str, config: IndexConfig, setting: Setting, sample: Sample
) -> dict[str, Any] | None:
    """The certificate's facts of an index that meets the declared recall on this sample; else None."""
    found = {}
    for query, exact in sample.items():
        recalls = hits(exact, ask(table, column, exact, setting, k=config.k), k=config.k)
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
    """Hold the index of a memory that grew to its recall, with its kept settings and its kept sample."""
    if column not in growth.kept:
        return None
    sample = grown(table, column, config, growth, seed=seed)
    first = {query: exact.take(slice(0, FIRST_LOOK)) for query, exact in sample.items()}
    facts = verify(table, column, config, setting, first)
    if facts is None and max(len(exact) for exact in sample.values()) > FIRST_LOOK:
        facts = verify(table, column, config, setting, sample)
    return None if facts is None else (facts, sample)


def ask(table: Any, column: str, exact: Exact, setting: Setting, *, k: int) -> list[list[str]]:
    """The index's answers to a sample: one more than k, for a query may find its own document."""
    return [
        [doc_id for doc_id, _ in answer]
        for answer in vector_search(table, column, exact.queries, setting, k=k + 1)
    ]
