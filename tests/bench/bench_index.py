"""Vector indexes: what ours costs and reaches beside LanceDB's defaults, on the same planted vectors.

python tests/bench/bench_index.py [--rows 1000 10000 100000] [--dim 512] [--profile profile.json]
"""

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.memory.index import IndexConfig, build_text_index, build_vector_index, make_index
from pipeline.memory.recall import exact_neighbours, hits, unit
from pipeline.memory.store import stream_vectors, vectors_arrow
from pipeline.memory.vectors import Setting, vector_search

COLUMN = "image_embedding"
WORDS = ["dog", "runs", "green", "grass", "near", "old", "red", "house", "by", "water", "boat", "hill"]


def planted(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors around 1,000 centres; noise as long as the centres, as in CLIP's crowded cone."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(1000, dim)).astype(np.float32)
    noise = random.normal(size=(count, dim)).astype(np.float32)
    return unit(centres[random.integers(0, 1000, count)] + noise)


def make_rows(rows: int, dim: int) -> pa.Table:
    random = np.random.default_rng(1)
    texts = [" ".join(random.choice(WORDS, 8)) for _ in range(rows)]
    vectors = vectors_arrow(planted(rows, dim, 1))
    ids = [f"{n:024d}" for n in range(rows)]
    return pa.table({"doc_id": ids, "text": texts, COLUMN: vectors, "text_embedding": vectors})


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started_s = time.perf_counter()
    value = function()
    return time.perf_counter() - started_s, value


def one_size(rows: int, dim: int) -> dict[str, Any]:
    import lancedb

    config, data = IndexConfig(kind="rq", columns=(COLUMN,)), make_rows(rows, dim)
    with tempfile.TemporaryDirectory() as folder:
        database = lancedb.connect(folder)
        write_s, table = timed(lambda: database.create_table("documents", data))
        text_s, _ = timed(lambda: build_text_index(table))
        whole_s, (facts, measured) = timed(lambda: build_vector_index(table, COLUMN, config))
        queries = planted(256, dim, 2)
        setting = Setting(**facts["setting"])
        batch_s, _ = timed(lambda: vector_search(table, COLUMN, queries, setting, k=10))
        loop_s, _ = timed(
            lambda: [vector_search(table, COLUMN, queries[i : i + 1], setting, k=10) for i in range(64)]
        )
        lowest = min(v["recall_lower_95"] for v in facts["by_query"].values())
        found = {
            "rows": rows,
            "write_s": write_s,
            "text_index_s": text_s,
            "vector_index_s": measured["build_s"],
            "tune_and_verify_s": whole_s - measured["build_s"],
            "index_bytes": measured["index_bytes"],
            "recall_lower_95": lowest,
            "batch_qps": 256 / batch_s,
            "loop_qps": 64 / loop_s,
            "setting": facts["setting"],
        }
        found["default_pq_s"], found["default_pq_recall"] = default_pq(table, queries)
        return found


def default_pq(table: Any, queries: np.ndarray) -> tuple[float, float]:
    """LanceDB's own default index, asked with its own defaults."""
    if table.count_rows() < 5000:
        return float("nan"), float("nan")
    seconds, _ = timed(lambda: make_index(table, COLUMN, Setting("pq", num_bits=8)))
    exact = exact_neighbours(stream_vectors(table, COLUMN), queries, [""] * len(queries), k=10)
    plain = Setting("pq", nprobes=20)
    answers = [[d for d, _ in a] for a in vector_search(table, COLUMN, queries, plain, k=10)]
    return seconds, float(np.mean(hits(exact, answers, k=10)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--profile", help="write the measurements here, for `vimi-data plan`")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    print(f"{'rows':>9} {'write':>7} {'bm25':>7} {'ours':>7} {'verify':>7} {'IVF_PQ':>7} {'PQ/ours':>8} "
          f"{'recall>=':>8} {'PQ recall':>9} {'batch q/s':>9} {'loop q/s':>9}")  # fmt: skip
    for rows in options.rows:
        r = one_size(rows, options.dim)
        results.append(r)
        print(f"{rows:>9,} {r['write_s']:>6.2f}s {r['text_index_s']:>6.2f}s {r['vector_index_s']:>6.2f}s "
              f"{r['tune_and_verify_s']:>6.1f}s {r['default_pq_s']:>6.1f}s "
              f"{r['default_pq_s'] / r['vector_index_s']:>7.0f}x {r['recall_lower_95']:>8.4f} "
              f"{r['default_pq_recall']:>9.3f} {r['batch_qps']:>9,.0f} "
              f"{r['loop_qps']:>9,.0f}", flush=True)  # fmt: skip
    if options.profile:
        machine = {"cpus": os.cpu_count(), "processor": platform.machine(), "dim": options.dim}
        with open(options.profile, "w") as file:  # noqa: PTH123
            json.dump({"machine": machine, "index": results}, file, indent=1)


if __name__ == "__main__":
    main()
