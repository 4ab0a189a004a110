"""Growing a memory by 1 %, beside building it whole; documents with planted vectors, without embedding.

    python tests/bench/bench_memory_growth.py [--rows 20000] [--dim 128] [--embed-ms 10]

Both sides commit, look for duplicates, index or keep the indexes, verify the declared recall and tag. With
embedding, `--embed-ms` of each document is added to both sides (a real CLIP takes that and more).
"""

import argparse
import tempfile
import time

import numpy as np
import pyarrow as pa

from pipeline.dedup import DedupConfig, find_duplicates
from pipeline.memory.commit import create_table
from pipeline.memory.config import IndexConfig
from pipeline.memory.finish import finish
from pipeline.memory.sample import Growth, load, save
from pipeline.memory.store import sorted_columns, upsert, vectors_numpy, version_tag
from tests.pipeline.memory_tables import documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--embed-ms", type=float, default=10.0)
    options = parser.parse_args()
    config, more = IndexConfig(kind="rq"), options.rows // 100
    rows = strangers(documents(options.rows, dim=options.dim), 1)
    extra = strangers(documents(more, dim=options.dim, start=options.rows), 2).combine_chunks()
    names = [name for name in extra.schema.names if name.endswith("_embedding")]
    batch = extra.to_batches()[0]
    new = [(batch["doc_id"], {name: vectors_numpy(batch[name]) for name in names})]
    with tempfile.TemporaryDirectory() as folder:
        table = create_table(folder, options.dim)
        started_s = time.perf_counter()
        upsert(table, rows)
        find_duplicates(table, DedupConfig())
        done = finish(table, config, seed=0)
        save(folder, "first", done.samples)
        version_tag(table, "m")
        whole_s = time.perf_counter() - started_s
        marks = [time.perf_counter()]
        upsert(table, extra)
        marks.append(time.perf_counter())
        find_duplicates(table, DedupConfig(), new=batch["doc_id"].to_pylist(), facts={"indexes": done.facts})
        marks.append(time.perf_counter())
        growth = Growth(load(folder, "first") or {}, lambda: new)
        grown = finish(table, config, seed=0, before={"indexes": done.facts}, growth=growth)
        marks.append(time.perf_counter())
        save(folder, "second", grown.samples)
        version_tag(table, "m")
        marks.append(time.perf_counter())
        ids = np.array(sorted_columns(table, ["doc_id"])["doc_id"].to_pylist())
    grown_s, embed_s = marks[-1] - marks[0], options.rows * options.embed_ms / 1000
    lows = [v["recall_lower_95"] for f in grown.facts.values() for v in f["by_query"].values()]
    steps = zip(("write", "duplicates", "verify", "tag"), np.diff(marks), strict=True)
    kept = "kept" if "verify_s" in grown.measured else "BUILT ANEW"
    print(
        f"{options.rows:,} documents x {options.dim}: build {whole_s:.2f} s without embedding; indexes {kept}"
    )
    print("  + 1 %: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in steps))
    print(f"  without embedding {grown_s / whole_s:.1%} of a build; with {options.embed_ms} ms a document "
          f"{(grown_s + embed_s / 100) / (whole_s + embed_s):.1%} (goal: at most 3 %)")  # fmt: skip
    print(f"  recall at least {min(lows):.4f}; duplicate keys {len(ids) - len(np.unique(ids))}")


def strangers(rows: pa.Table, seed: int) -> pa.Table:
    """With perceptual hashes of unrelated pictures."""
    hashes = np.random.default_rng(seed).integers(0, 2**64, len(rows), np.uint64)
    return rows.set_column(rows.schema.get_field_index("phash"), "phash", pa.array(hashes))


if __name__ == "__main__":
    main()
