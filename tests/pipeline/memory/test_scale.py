"""Memory of the join's workers: one shard at a time, however many there are; the long form of it is slow."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.memory import open_memory
from pipeline.memory.retrieve import RETRIEVERS
from pipeline.memory.tile import Tiles, ask
from tests.bench.bench_scale import DRIVER, DRIVER_BYTES, WORKER_BYTES, asked, measured, planted_rows, run
from tests.pipeline.memory.memory_tables import make_memory

SHARDS, SHARD_ROWS, DIM = 6, 6000, 256


def peaks_kb(uri: str, kept: int) -> list[int]:
    """The largest resident memory so far, after each shard is searched by all retrievers."""
    memory = open_memory(uri, read_through=False)
    texts, vectors = asked(100, memory.dim)
    tiles, found = Tiles(memory, "document", kept=kept), []
    for number in range(len(memory.shards)):
        for method in RETRIEVERS.values():
            ask(tiles.open(number), method, texts, vectors, 100)
        found.append(_peak_kb())
    return found


def _peak_kb() -> int:
    """Of this program alone: `ru_maxrss` begins with what its parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def test_a_worker_of_the_join_holds_one_shard(tmp_path: Path) -> None:
    """Once it has met a few, its memory grows by less than a third of what holding all of them takes."""
    rows = pa.concat_tables([planted_rows(n * SHARD_ROWS, SHARD_ROWS, DIM) for n in range(SHARDS)])
    make_memory(str(tmp_path), rows, shard_rows=SHARD_ROWS, unit_rows=SHARD_ROWS)
    one, every = (measured(peaks_kb, str(tmp_path), kept)[0] for kept in (1, SHARDS))
    assert one[-1] - one[2] < (every[-1] - every[2]) / 3


@pytest.mark.slow
def test_memory_is_flat_while_the_memory_grows(tmp_path: Path) -> None:
    """Every part of build-index and the join, from 25,000 to 100,000 documents in shards of 12,500."""
    small, large = (run(count, DIM, 500, 12_500, str(tmp_path / str(count))) for count in (25_000, 100_000))
    for name, cost in large.items():
        assert cost.pss_bytes < (DRIVER_BYTES if name == DRIVER else WORKER_BYTES)
        assert cost.pss_bytes < 1.25 * small[name].pss_bytes
