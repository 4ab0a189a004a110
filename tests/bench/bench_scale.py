"""Memory and time of building a memory and joining captions with it, at growing sizes.

    python tests/bench/bench_scale.py [--rows 100000 1000000] [--dim 64] [--queries 10000] [--shard-rows 250000]
        [--profile FILE] [--held-out 10000000]

With --profile the measurements become those that `vimi-data plan` fits its laws to. A held-out size is measured
too, and set beside what these laws say of it, which never saw it.

Planted documents (no pictures, no CLIP). Each part runs in a process of its own; its memory is the kernel's
proportional set size (PSS, so that a shared page counts once), the largest of samples every 20 ms; it fails
above 2 GB a worker, or 1 GB for the driver. faiss, LanceDB and bm25s, if installed, search beside them up to
`PEER_ROWS` documents.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra.storage import join, write_bytes
from pipeline.journal import Unit
from pipeline.memory import open_memory
from pipeline.memory.build_index.duplicates import (
    Documents,
    KeyWriter,
    PairFinder,
    key_units,
    num_bands,
    pair_units,
)
from pipeline.memory.build_index.index import IndexConfig, build_indexes
from pipeline.memory.build_index.shards import DROPPED, ShardWriter, create_table, deal
from pipeline.memory.retrieve import RETRIEVERS
from pipeline.memory.search import nearest
from pipeline.memory.tile import Tiles, ask
from pipeline.memory.vectors import unit, vectors_arrow, vectors_numpy
from pipeline.prompts.augment.candidates import candidates
from pipeline.prompts.exclusion import Exclusion
from pipeline.prompts.guard import GuardConfig
from pipeline.report.estimate import fit_law
from pipeline.schema import memory_schema
from tests.pipeline.memory.memory_tables import certify_memory, commit_memory, stage

UNIT_ROWS, WORDS, TEXT_WORDS = 10_000, 20_000, 10
DEPTH = 100
WORKER_BYTES, DRIVER_BYTES = 2 << 30, 1 << 30
"""What a process may take."""
PEER_ROWS = 1_000_000
DRIVER = "commit, the driver"
SHARED = {
    "keys_s": ("keys of duplicates",),
    "duplicates_s": ("duplicates",),
    "shards_s": ("shards",),
    "index_s": ("index for search", "recall of the index"),
}
"""Columns of the profile, and the parts that each is the sum of."""


def planted_rows(start: int, count: int, dim: int) -> pa.Table:
    """Documents number `start` to `start + count`: clustered vectors, ten words each, random hashes."""
    random = np.random.default_rng([11, start])
    centres = np.random.default_rng(0).normal(size=(100, dim))
    vectors = vectors_arrow(unit(centres[random.integers(0, 100, count)] + random.normal(size=(count, dim))))
    drawn = random.choice(WORDS, (count, TEXT_WORDS), p=_chances())
    values: dict[str, Any] = {
        "doc_id": [f"{(n * 0x9E3779B97F4A7C15) % 2**64:016x}{n:08x}" for n in range(start, start + count)],
        "text": [" ".join(f"word{number}" for number in row) for row in drawn],
        "source_sha256": [f"{n:064x}" for n in range(start, start + count)],
        "source_uri": [f"/corpus/{n}.png" for n in range(start, start + count)],
        "phash": random.integers(0, 2**63, count),
        **dict.fromkeys(("start_s", "end_s"), np.zeros(count)),
        **dict.fromkeys(("width_px", "height_px"), np.full(count, 64)),
    }
    empty = {field.name: pa.nulls(count, field.type) for field in memory_schema(dim)}
    schema = memory_schema(dim)
    arrays = [
        vectors
        if f.name.endswith("_embedding")
        else pa.array(values[f.name], f.type)
        if f.name in values
        else empty[f.name]
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _chances() -> np.ndarray:
    """The n-th commonest word has a probability of about 1 / n."""
    chances = 1 / np.arange(1, WORDS + 1)
    return chances / chances.sum()


@dataclass(frozen=True)
class Cost:
    """What one call took, in a process of its own."""

    cpu_s: float
    """Of all its threads."""
    wall_s: float
    pss_bytes: int
    """The largest, of the whole process."""


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[Any, Cost]:
    """The result of a function, and what it took; starting its process is not counted."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, work, arguments))
    most = 0
    process.start()
    while not ours.poll(0.02):
        most = max(most, _pss(process.pid or 0))
        if not process.is_alive():
            raise RuntimeError(f"{work.__name__} died")
    result, cpu_s, wall_s = ours.recv()
    process.join()
    return result, Cost(cpu_s, wall_s, most)


def _send(pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    started_s, cpu_s = time.monotonic(), time.process_time()
    result = work(*arguments)
    pipe.send((result, time.process_time() - cpu_s, time.monotonic() - started_s))


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def run_unit(make_worker: Callable[[], Any], unit: Unit) -> Any:
    return make_worker()(unit.payload)


def each(make_worker: Callable[[], Any], units: Iterable[Unit]) -> list[tuple[Any, "Cost"]]:
    """Receipt and cost of each unit."""
    return [measured(run_unit, make_worker, unit) for unit in units]


def asked(queries: int, dim: int) -> tuple[list[str], np.ndarray]:
    """Words and unit vectors of the captions."""
    rows = planted_rows(10**9, queries, dim)
    return rows["text"].to_pylist(), unit(vectors_numpy(rows["text_embedding"].combine_chunks()))


def join_tile(out: str, name: str, number: int, queries: int) -> int:
    memory = open_memory(out, read_through=False)
    tile, method = Tiles(memory, "document").open(number), RETRIEVERS[name]
    return len(candidates(tile, method, *asked(queries, memory.dim), DEPTH, GuardConfig(), Exclusion()))


def own_search(out: str, queries: int, name: str) -> float:
    """CPU seconds of our exact search of all shards, each opened and asked once before."""
    memory = open_memory(out, read_through=False)
    texts, vectors = asked(queries, memory.dim)
    took_s = 0.0
    for tile in Tiles(memory, "document"):
        ask(tile, RETRIEVERS[name], texts[:1], vectors[:1], DEPTH)
        started_s = time.process_time()
        ask(tile, RETRIEVERS[name], texts, vectors, DEPTH)
        took_s += time.process_time() - started_s
    return took_s


def faiss_flat(out: str, queries: int) -> float:
    """CPU seconds of faiss' exact search by inner product, its index made before."""
    faiss: Any = importlib.import_module("faiss")
    memory = open_memory(out, read_through=False)
    index = faiss.IndexFlatIP(memory.dim)
    for batch in memory.dataset.to_batches(columns=["document_embedding"]):
        index.add(unit(vectors_numpy(batch["document_embedding"])))
    vectors, started_s = asked(queries, memory.dim)[1], time.process_time()
    index.search(vectors, DEPTH)
    return time.process_time() - started_s


def lancedb_scan(out: str, queries: int) -> float:
    """CPU seconds of LanceDB's exact search of a batch."""
    memory = open_memory(out, read_through=False)
    vectors, started_s = asked(queries, memory.dim)[1], time.process_time()
    nearest(memory, memory.table, "document_embedding", vectors, DEPTH)
    return time.process_time() - started_s


def bm25s_search(out: str, queries: int) -> float:
    """CPU seconds of bm25s' search, its index made before; words as they stand."""
    bm25s: Any = importlib.import_module("bm25s")
    memory = open_memory(out, read_through=False)
    texts = memory.dataset.to_table(columns=["text"])["text"].to_pylist()
    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index([text.split() for text in texts], show_progress=False)
    words, started_s = [text.split() for text in asked(queries, memory.dim)[0]], time.process_time()
    index.retrieve(words, k=DEPTH, show_progress=False, n_threads=1)
    return time.process_time() - started_s


PEERS = {
    "faiss, IndexFlatIP": ("faiss", faiss_flat, "clip"),
    "LanceDB, exact": ("lancedb", lancedb_scan, "clip"),
    "bm25s": ("bm25s", bm25s_search, "bm25"),
}
"""What searches too: its package, how it is asked, and the retriever that does the same."""


def run(rows: int, dim: int, queries: int, shard_rows: int, folder: str) -> dict[str, Cost]:
    """Part -> cost of all its units, one after the other; the largest PSS of one."""
    out, build = join(folder, "memory"), join(folder, "memory/build")
    create_table(out, dim)
    write_bytes(join(build, DROPPED), b"")
    receipts = []
    for start in range(0, rows, UNIT_ROWS):
        receipts += stage(build, planted_rows(start, min(UNIT_ROWS, rows - start), dim), UNIT_ROWS)
    groups = deal(receipts, shard_rows, shards=0, documents=0)
    Documents(out, build, None, 0).write(groups)
    bands, units = num_bands(rows, 10), key_units(groups, [])
    keys = each(partial(KeyWriter, out, build, bands, len(units)), units)
    partitions = pair_units([receipt for receipt, _ in keys], len(units))
    pairs = each(partial(PairFinder, Documents(out, build, None, 0), bands, 10, 0.9, True), partitions)
    shards = each(partial(ShardWriter, out, build, dim, "english"), [group.unit("shard") for group in groups])
    facts, committed = measured(commit_memory, out, [receipt for receipt, _ in shards], rows, dim)
    parts = {DRIVER: tell(DRIVER, [(None, committed)])}
    for name, done in (("keys of duplicates", keys), ("duplicates", pairs), ("shards", shards)):
        parts[name] = tell(name, done)

    def measure(what: str, units: Sequence[Unit], make_worker: Callable[[], Any]) -> list[Any]:
        done = each(make_worker, units)
        parts[what] = tell(what, done)
        return [receipt for receipt, _ in done]

    facts["indexes"] = build_indexes(out, build, facts, IndexConfig(min_rows=1), measure)
    certify_memory(out, facts, rows)
    for name in RETRIEVERS:
        tiles = [measured(join_tile, out, name, n, queries) for n in range(len(groups))]
        parts[f"join {name}"] = tell(f"join {name}", tiles)
    if rows <= PEER_ROWS:
        search_beside(out, queries)
    return parts


def search_beside(out: str, queries: int) -> None:
    """Print what others' exact search of the same captions takes, in parts of ours."""
    own_s = {name: measured(own_search, out, queries, name)[0] for name in ("bm25", "clip")}
    for name, (package, work, same) in PEERS.items():
        if importlib.util.find_spec(package):
            took_s = measured(work, out, queries)[0]
            ours = f"  search, {same}: {own_s[same]:.1f} CPU s"
            print(f"{ours}; {name}: {took_s:.1f}, {took_s / own_s[same]:.2f} times")


def tell(name: str, done: Sequence[tuple[Any, Cost]]) -> Cost:
    """What all units of a part took, printed as soon as it is known."""
    costs = [cost for _, cost in done]
    cpu_s, wall_s = sum(cost.cpu_s for cost in costs), sum(cost.wall_s for cost in costs)
    total = Cost(cpu_s, wall_s, max(cost.pss_bytes for cost in costs))
    fate = "" if is_within(name, total) else "  above the limit"
    took = f"{wall_s:8.1f} s {cpu_s:8.1f} CPU s"
    print(f"  {name:20} {took}  {total.pss_bytes / 2**20:8.0f} MB{fate}", flush=True)
    return total


def is_within(name: str, cost: Cost) -> bool:
    return cost.pss_bytes <= (DRIVER_BYTES if name == DRIVER else WORKER_BYTES)


def profile_run(rows: int, found: dict[str, Cost]) -> dict[str, Any]:
    """One run as `pipeline.report.estimate` reads it."""
    return {
        "rows": rows,
        **{key: round(sum(found[name].cpu_s for name in names), 3) for key, names in SHARED.items()},
        "driver_s": round(found[DRIVER].cpu_s, 3),
        "driver_bytes": found[DRIVER].pss_bytes,
        "worker_bytes": max(cost.pss_bytes for name, cost in found.items() if name != DRIVER),
        "join_s": {name: round(found[f"join {name}"].cpu_s, 3) for name in RETRIEVERS},
    }


def foretold(runs: list[dict[str, Any]], rows: int) -> dict[str, float]:
    """What the plan's laws, fitted to some runs, say of another size: the numbers of its own run."""
    names = (*SHARED, "driver_s", "driver_bytes")
    found = {name: fit_law([(run["rows"], run[name]) for run in runs])(rows) for name in names}
    largest = max(runs, key=lambda run: run["rows"])
    joins = {f"join {name}, s": s / largest["rows"] * rows for name, s in largest["join_s"].items()}
    return {**found, "worker_bytes": largest["worker_bytes"], **joins}


def compare(runs: list[dict[str, Any]], held_out: dict[str, Any]) -> None:
    """Print what the plan says of a run beside what it took."""
    took = held_out | {f"join {name}, s": seconds for name, seconds in held_out["join_s"].items()}
    print(f"the plan of {held_out['rows']:,} documents, fitted to {[run['rows'] for run in runs]}")
    for name, told in foretold(runs, held_out["rows"]).items():
        print(f"  {name:20} told {told:14,.1f}  took {took[name]:14,.1f}  {told / took[name]:6.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--shard-rows", type=int, default=250_000)
    parser.add_argument("--profile", help="write the runs into this file, for `vimi-data plan`")
    parser.add_argument("--held-out", type=int, nargs="*", default=[], help="sizes to try the plan on")
    options = parser.parse_args()
    runs, is_flat = [], True
    for rows in [*options.rows, *options.held_out]:
        print(f"{rows:,} documents of {options.dim} dimensions, {options.queries:,} captions", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = run(rows, options.dim, options.queries, options.shard_rows, folder)
        is_flat &= all(is_within(name, cost) for name, cost in found.items())
        runs.append(profile_run(rows, found))
    fitted = runs[: len(options.rows)]
    for held_out in runs[len(options.rows) :]:
        compare(fitted, held_out)
    if options.profile:
        place = Path(options.profile)
        scale = {"dim": options.dim, "captions": options.queries, "shard_rows": options.shard_rows}
        profile = json.loads(place.read_text()) if place.exists() else {}
        profile["scale"] = {"cpus": os.cpu_count(), **scale, "runs": fitted}
        place.write_text(json.dumps(profile, indent=1) + "\n")
    if not is_flat:
        sys.exit("a process took more memory than it may")


if __name__ == "__main__":
    main()
