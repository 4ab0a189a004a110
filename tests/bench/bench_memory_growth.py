"""Growing a memory by 1 %, beside building it whole; many writers at once; documents with planted vectors.

python tests/bench/bench_memory_growth.py [--rows 20000] [--dim 128]
"""

import argparse
import tempfile
import time

import numpy as np

from pipeline.memory.commit import create_table
from pipeline.memory.finish import finish
from pipeline.memory.config import IndexConfig
from pipeline.memory.store import sorted_columns, upsert
from tests.pipeline.memory_tables import documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=128)
    options = parser.parse_args()
    config = IndexConfig(kind="rq", num_queries=300)
    more = options.rows // 100
    rows = documents(options.rows, dim=options.dim)
    extra = documents(more, dim=options.dim, start=options.rows)
    with tempfile.TemporaryDirectory() as folder:
        table = create_table(folder, options.dim)
        started_s = time.perf_counter()
        upsert(table, rows)
        facts, _ = finish(table, config, seed=0, before=None)
        whole_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        upsert(table, extra)
        added_s = time.perf_counter() - started_s
        finish(table, config, seed=0, before={"indexes": facts})
        grown_s = time.perf_counter() - started_s
        ids = np.array(sorted_columns(table, ["doc_id"])["doc_id"].to_pylist())
    print(f"{options.rows:,} documents x {options.dim}: build {whole_s:.2f} s (without embedding)")
    print(f"  + 1 %: write {added_s:.3f} s = {added_s / whole_s:.1%} of it, with verification {grown_s:.2f} s")
    print(f"  duplicate keys {len(ids) - len(np.unique(ids))}")


if __name__ == "__main__":
    main()
