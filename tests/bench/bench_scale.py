"""Memory and time of building a memory and joining captions with it, at growing sizes.

    python tests/bench/bench_scale.py [--rows 100000 1000000] [--dim 64] [--queries 10000] [--shard-rows 250000]
        [--profile FILE]

With --profile the measurements become those that `vimi-data plan` fits its laws to.

Planted documents (no pictures, no CLIP). Each part runs in a process of its own; its memory is the kernel's
proportional set size (PSS, so that a shared page counts once), the largest of samples every 20 ms.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra.storage import join, write_bytes
from pipeline.memory import open_memory
from pipeline.memory.build_index.duplicates import (
    Documents,
    KeyWriter,
    PairFinder,
    key_units,
    num_bands,
    pair_units,
)
from pipeline.memory.build_index.shards import DROPPED, Group, ShardWriter, create_table, deal
from pipeline.memory.retrieve import RETRIEVERS
from pipeline.memory.tile import Tiles
from pipeline.memory.vectors import unit, vectors_arrow
from pipeline.prompts.augment.candidates import candidates
from pipeline.prompts.exclusion import Exclusion
from pipeline.prompts.guard import GuardConfig
from pipeline.schema import memory_schema
from tests.pipeline.memory.memory_tables import publish_memory, stage

UNIT_ROWS, WORDS, TEXT_WORDS = 10_000, 20_000, 10
LIMIT_BYTES = 2 << 30
INDEX = "commit, index"


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


def write_shard(out: str, build: str, dim: int, group: Group) -> Any:
    return ShardWriter(out, build, dim, "english")(group.unit("shard").payload)


def write_keys(out: str, build: str, bands: int, partitions: int, payload: Any) -> Any:
    return KeyWriter(out, build, bands, partitions)(payload)


def find_pairs(out: str, build: str, bands: int, payload: Any) -> Any:
    return PairFinder(Documents(out, build, None, 0), bands, 10, 0.9, True)(payload)


def join_tile(out: str, name: str, number: int, queries: int) -> int:
    memory = open_memory(out, read_through=False)
    rows = planted_rows(10**9, queries, memory.dim)
    texts, vectors = rows["text"].to_pylist(), np.stack(rows["text_embedding"].to_pylist()).astype(np.float32)
    tile, method = Tiles(memory, "document").open(number), RETRIEVERS[name]
    return len(candidates(tile, method, texts, unit(vectors), 100, GuardConfig(), Exclusion()))


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
    keys = [measured(write_keys, out, build, bands, len(units), unit.payload) for unit in units]
    partitions = pair_units([receipt for receipt, _ in keys], len(units))
    pairs = [measured(find_pairs, out, build, bands, unit.payload) for unit in partitions]
    shards = [measured(write_shard, out, build, dim, group) for group in groups]
    written = [receipt for receipt, _ in shards]
    sealed = measured(publish_memory, out, written, rows, dim)
    parts = {"keys of duplicates": keys, "duplicates": pairs, "shards": shards, INDEX: [sealed]}
    for name in RETRIEVERS:
        parts[f"join {name}"] = [measured(join_tile, out, name, n, queries) for n in range(len(groups))]
    return {name: together([cost for _, cost in runs]) for name, runs in parts.items()}


def together(costs: Sequence[Cost]) -> Cost:
    """Of all units of a part."""
    return Cost(
        sum(cost.cpu_s for cost in costs),
        sum(cost.wall_s for cost in costs),
        max(cost.pss_bytes for cost in costs),
    )


def profile_run(rows: int, found: dict[str, Cost]) -> dict[str, Any]:
    """One run as `pipeline.report.estimate` reads it."""
    shared = {"keys_s": "keys of duplicates", "duplicates_s": "duplicates", "shards_s": "shards"}
    return {
        "rows": rows,
        **{key: round(found[name].cpu_s, 3) for key, name in shared.items()},
        "index_s": round(found[INDEX].wall_s, 3),
        "index_bytes": found[INDEX].pss_bytes,
        "worker_bytes": max(cost.pss_bytes for name, cost in found.items() if name != INDEX),
        "join_s": {name: round(found[f"join {name}"].cpu_s, 3) for name in RETRIEVERS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--shard-rows", type=int, default=250_000)
    parser.add_argument("--profile", help="write the runs into this file, for `vimi-data plan`")
    options = parser.parse_args()
    runs = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            found = run(rows, options.dim, options.queries, options.shard_rows, folder)
        print(f"{rows:,} documents of {options.dim} dimensions, {options.queries:,} captions")
        for name, cost in found.items():
            fate = "" if cost.pss_bytes <= LIMIT_BYTES else "  above the limit"
            took = f"{cost.wall_s:8.1f} s {cost.cpu_s:8.1f} CPU s"
            print(f"  {name:20} {took}  {cost.pss_bytes / 2**20:8.0f} MB{fate}", flush=True)
        runs.append(profile_run(rows, found))
    if options.profile:
        place = Path(options.profile)
        scale = {"dim": options.dim, "captions": options.queries, "shard_rows": options.shard_rows}
        profile = json.loads(place.read_text()) if place.exists() else {}
        profile["scale"] = {"cpus": os.cpu_count(), **scale, "runs": runs}
        place.write_text(json.dumps(profile, indent=1) + "\n")


if __name__ == "__main__":
    main()
