"""`vimi-data benchmark`: the prompts of a protocol as ordinary prompt shards, and what must not be trained on.

a user's copy ─▶ items ─▶ (documents from a memory) ─▶ part-*.parquet, meta.parquet
                     └──▶ exclude.jsonl: for augment's guard.exclude, so that retrieval never sees the exam
"""

from pipeline.prompts.benchmark.job import BenchmarkConfig, check, run

__all__ = ["BenchmarkConfig", "check", "run"]
