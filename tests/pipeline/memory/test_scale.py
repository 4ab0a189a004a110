"""Memory of the join's workers: one shard at a time, however many there are; the long form of it is slow."""

import gc
import weakref
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.memory import open_memory
from pipeline.memory.retrieve import RETRIEVERS
from pipeline.memory.tile import Tiles, ask
from tests.bench.bench_scale import DRIVER, DRIVER_BYTES, WORKER_BYTES, asked, planted_rows, run
from tests.pipeline.memory.memory_tables import make_memory

SHARDS, SHARD_ROWS, DIM = 6, 500, 16


def alive_after(uri: str, kept: int) -> tuple[int, int]:
    """How many (shards, of all their blocks of vectors) still lie in memory when all shards were searched.

    Not the resident memory: how far Lance reads ahead hangs on the moment, by as much as several shards.
    """
    memory = open_memory(uri, read_through=False)
    texts, vectors = asked(100, memory.dim)
    tiles, shards, blocks, answers = Tiles(memory, "document", kept=kept), [], [], []
    for number in range(len(memory.shards)):
        answers += [ask(tiles.open(number), method, texts, vectors, 100) for method in RETRIEVERS.values()]
        shards.append(weakref.ref(tiles.open(number)))
        blocks += [weakref.ref(block.vectors) for block in tiles.open(number).blocks()]
    gc.collect()
    return sum(ref() is not None for ref in shards), sum(ref() is not None for ref in blocks)


def test_a_worker_of_the_join_holds_one_shard(tmp_path: Path) -> None:
    """However many it has met, and although it keeps their answers; one that may keep them all does."""
    rows = pa.concat_tables([planted_rows(n * SHARD_ROWS, SHARD_ROWS, DIM) for n in range(SHARDS)])
    make_memory(str(tmp_path), rows, shard_rows=SHARD_ROWS, unit_rows=SHARD_ROWS)
    assert alive_after(str(tmp_path), 1) == (1, 1)
    assert alive_after(str(tmp_path), SHARDS) == (SHARDS, SHARDS)


@pytest.mark.slow
def test_memory_is_flat_while_the_memory_grows(tmp_path: Path) -> None:
    """Every part of build-index and the join, from 25,000 to 100,000 documents in shards of 12,500."""
    small, large = (run(count, DIM, 500, 12_500, str(tmp_path / str(count))) for count in (25_000, 100_000))
    for name, cost in large.items():
        assert cost.pss_bytes < (DRIVER_BYTES if name == DRIVER else WORKER_BYTES)
        assert cost.pss_bytes < 1.25 * small[name].pss_bytes
