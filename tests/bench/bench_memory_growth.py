"""Growing a memory by 1 %, beside building it whole; documents with planted vectors, without embedding.

    python tests/bench/bench_memory_growth.py [--rows 100000] [--dim 512] [--embed-ms 22]

Both sides commit, look for duplicates, index or keep the indexes, verify the declared recall and tag; wall
and CPU seconds of each step. With embedding, `--embed-ms` of each document is added to both sides (22 ms is
what 2 cores take with the offline CLIP, `bench_embed`), and to the small one the start of Ray and the
loading of the model, `--start-s`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from infra.certificate import Certificate
from pipeline.memory.commit import create_table
from pipeline.memory.duplicates import find_duplicates
from pipeline.memory.index import Finished, finish
from pipeline.memory.near_duplicates import DedupConfig
from pipeline.memory.recall import IndexConfig
from pipeline.memory.sample import Growth, load, save
from pipeline.memory.store import sorted_columns, upsert, vectors_arrow, vectors_numpy, version_tag
from tests.bench.bench_index import planted
from tests.pipeline.memory.memory_tables import documents

CHUNK = 20_000


def rows_of(start: int, count: int, dim: int) -> pa.Table:
    """Documents of strangers: unrelated perceptual hashes, vectors around 1,000 centres."""
    table = documents(count, dim=8, start=start)
    hashes = np.random.default_rng(start).integers(0, 2**64, count, np.uint64)
    table = table.set_column(table.schema.get_field_index("phash"), "phash", pa.array(hashes))
    for name in [name for name in table.schema.names if name.endswith("_embedding")]:
        vectors = pa.chunked_array([vectors_arrow(planted(count, dim, 100 + start))])
        field = pa.field(name, vectors.type, metadata=table.schema.field(name).metadata)
        table = table.set_column(table.schema.get_field_index(name), field, vectors)
    return table


class Steps:
    """Wall and CPU seconds of named steps."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def time(self, name: str, step: Callable[[], Any]) -> Any:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        value = step()
        self.found[name] = time.perf_counter() - wall_s, time.process_time() - cpu_s
        return value

    def total(self) -> np.ndarray:
        return np.sum(list(self.found.values()), axis=0)

    def __str__(self) -> str:
        return ", ".join(f"{name} {wall_s:.2f} ({cpu_s:.2f})" for name, (wall_s, cpu_s) in self.found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--embed-ms", type=float, default=22.0)
    parser.add_argument("--start-s", type=float, default=12.0)
    options = parser.parse_args()
    config, more = IndexConfig(kind="rq"), options.rows // 100
    extra = rows_of(options.rows, more, options.dim).combine_chunks()
    names = [name for name in extra.schema.names if name.endswith("_embedding")]
    batch = extra.to_batches()[0]
    new = [(batch["doc_id"], {name: vectors_numpy(batch[name]) for name in names})]
    with tempfile.TemporaryDirectory() as folder:
        table = create_table(folder, options.dim)
        whole, grown = Steps(), Steps()
        for rows in blocks(options.rows, options.dim):
            whole.time(f"write to {table.count_rows() + len(rows):,}", lambda rows=rows: upsert(table, rows))
        done: Finished = whole.time("index and verify", lambda: finish(table, config))
        facts = {"indexes": done.facts}
        whole.time("duplicates", lambda: find_duplicates(table, DedupConfig(), facts=facts))
        whole.time("tag", lambda: (save(folder, "first", done.samples), version_tag(table, "m")))
        grown.time("write", lambda: upsert(table, extra))
        ids = batch["doc_id"].to_pylist()
        grown.time("duplicates", lambda: find_duplicates(table, DedupConfig(), new=ids, facts=facts))
        version = {"memory_version": "first"}
        first = Certificate(job="x", config_hash="x", num_in=0, num_out=0, facts=version)
        growth = Growth(load(folder, first) or {}, lambda: new)
        after: Finished = grown.time("verify", lambda: finish(table, config, before=facts, growth=growth))
        grown.time("tag", lambda: (save(folder, "second", after.samples), version_tag(table, "m")))
        every = np.array(sorted_columns(table, ["doc_id"])["doc_id"].to_pylist())
    lows = [v["recall_lower_95"] for f in after.facts.values() for v in f["by_query"].values()]
    kept = "kept" if "verify_s" in after.measured else "BUILT ANEW"
    embed_s = options.rows * options.embed_ms / 1000
    (wall_s, cpu_s), (grown_s, grown_cpu_s) = whole.total(), grown.total()
    with_embedding = (grown_s + embed_s / 100 + options.start_s) / (wall_s + embed_s + options.start_s)
    print(f"{options.rows:,} documents x {options.dim}; wall (CPU) seconds; indexes {kept}")
    print(f"  build, {wall_s:.1f} ({cpu_s:.1f}): {whole}")
    print(f"  + 1 %, {grown_s:.1f} ({grown_cpu_s:.1f}): {grown}")
    print(f"  without embedding {grown_s / wall_s:.1%} of a build ({grown_cpu_s / cpu_s:.1%} of its CPU time);")
    print(f"  with {options.embed_ms} ms a document and {options.start_s} s to start {with_embedding:.1%}"
          " (goal: at most 3 %)")  # fmt: skip
    print(f"  recall at least {min(lows):.4f}; duplicate keys {len(every) - len(np.unique(every))}")


def blocks(rows: int, dim: int) -> Iterator[pa.Table]:
    for start in range(0, rows, CHUNK):
        yield rows_of(start, min(CHUNK, rows - start), dim)


if __name__ == "__main__":
    main()
