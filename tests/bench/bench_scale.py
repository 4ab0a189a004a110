"""Memory and time of building a memory and joining captions with it, at growing sizes.

    python tests/bench/bench_scale.py [--rows 100000 1000000] [--dim 64] [--queries 10000] [--shard-rows 250000]

Planted documents (no pictures, no CLIP). Each part runs in a process of its own; its memory is the kernel's
proportional set size (PSS, so that a shared page counts once), the largest of samples every 20 ms.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
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


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float, int]:
    """(result, seconds, largest PSS in bytes) of a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, work, arguments))
    started_s, most = time.monotonic(), 0
    process.start()
    while not ours.poll(0.02):
        most = max(most, _pss(process.pid or 0))
        if not process.is_alive():
            raise RuntimeError(f"{work.__name__} died")
    result, seconds = ours.recv(), time.monotonic() - started_s
    process.join()
    return result, seconds, most


def _send(pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(work(*arguments))


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


def run(rows: int, dim: int, queries: int, shard_rows: int, folder: str) -> dict[str, tuple[float, int]]:
    """Part -> (seconds of all its units, one after the other; largest PSS of one)."""
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
    partitions = pair_units([receipt for receipt, *_ in keys], len(units))
    pairs = [measured(find_pairs, out, build, bands, unit.payload) for unit in partitions]
    shards = [measured(write_shard, out, build, dim, group) for group in groups]
    written = [receipt for receipt, *_ in shards]
    sealed = measured(publish_memory, out, written, rows, dim)
    parts = {"keys of duplicates": keys, "duplicates": pairs, "shards": shards, "commit, index": [sealed]}
    for name in RETRIEVERS:
        parts[f"join {name}"] = [measured(join_tile, out, name, n, queries) for n in range(len(groups))]
    return {
        name: (sum(seconds for _, seconds, _ in runs), max(most for *_, most in runs))
        for name, runs in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--shard-rows", type=int, default=250_000)
    options = parser.parse_args()
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            found = run(rows, options.dim, options.queries, options.shard_rows, folder)
        print(f"{rows:,} documents of {options.dim} dimensions, {options.queries:,} captions")
        for name, (seconds, most) in found.items():
            fate = "" if most <= LIMIT_BYTES else "  above the limit"
            print(f"  {name:20} {seconds:8.1f} s  {most / 2**20:8.0f} MB{fate}")


if __name__ == "__main__":
    main()
