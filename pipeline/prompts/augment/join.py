"""The join in tiles: a block of queries in a shard of the memory, candidates to a file.

    queries   a block of slices -> its captions' vectors                  (where the retriever compares vectors)
    tiles     a block x a shard -> the `depth` best, with the guard's facts
    slices    a slice's part of all shards' files, merged

One worker holds one shard at a time, so its memory doesn't grow with the memory. A memory of one shard needs no
files: the worker of a slice searches it for itself, by the same functions.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from infra.certificate import CERTIFICATE
from infra.errors import ConfigError, DataError
from infra.storage import exists, filesystem, free_bytes, join, list_files, read_bytes, size_bytes, write_bytes
from pipeline.journal import Receipt, Unit
from pipeline.memory import Memory
from pipeline.memory.retrieve.hits import merge
from pipeline.memory.store import check_shard
from pipeline.memory.tile import Tiles
from pipeline.prompts.augment.candidates import CANDIDATE, candidates, fused
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.slices import Retrieving

FOLDER, CHECKED = "join", "checked"
BLOCK_SLICES = 16
"""Slices of a block: 4,096 captions meet each shard at once. Ours."""


def is_joined(config: AugmentConfig, memory: Memory) -> bool:
    return len(memory.shards) > 1 and config.retrieve.k > 0


def check_room(config: AugmentConfig, memory: Memory, rows: int) -> None:
    """Refuse a disk that can't hold the join's files.

    Raises:
        ConfigError: says how much they take.
    """
    lists = 1 + (config.retrieve.method.needs_words and config.retrieve.method.needs_vectors)
    most = sum(min(config.retrieve.depth, shard.rows) for shard in memory.shards)
    need, free = rows * lists * most * CANDIDATE.itemsize, free_bytes(config.out)
    if free is None or not is_joined(config, memory) or exists(join(config.out, CERTIFICATE)):
        return
    free += sum(size_bytes(place) for place in list_files(join(config.out, FOLDER)))  # of a run before
    if need > free:
        raise ConfigError(
            f"the candidates of {rows:,} captions in {len(memory.shards):,} shards need up to {need:,} bytes; "
            f"{config.out} has {free:,}",
            cure="another disk or an object store as out, fewer clips, or a smaller retrieve.depth",
        )


def check_units(memory: Memory) -> list[Unit]:
    return [Unit(f"check-{shard.name}", {"shard": shard.name}) for shard in memory.shards]


class CheckWorker(Retrieving):
    """Reads a shard through and compares its files with their hashes; says what is damaged."""

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        try:
            check_shard(self.config.memory, payload["shard"])
        except DataError as error:
            return {"damage": str(error)}
        return {}


def blocks(slices: Sequence[Unit]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number, payloads of its slices) of each block."""
    for number, start in enumerate(range(0, len(slices), BLOCK_SLICES)):
        yield number, [unit.payload for unit in slices[start : start + BLOCK_SLICES]]


def query_units(slices: Sequence[Unit]) -> list[Unit]:
    return [Unit(f"queries-{n:05d}", {"block": n, "slices": some}) for n, some in blocks(slices)]


def tile_units(slices: Sequence[Unit], memory: Memory) -> list[Unit]:
    """Shard by shard, so that a worker opens each of them once."""
    return [
        Unit(f"tile-{n:05d}-{shard:05d}", {"block": n, "shard": shard, "slices": some})
        for shard in range(len(memory.shards))
        for n, some in blocks(slices)
    ]


class QueryWorker(Retrieving):
    """Writes the text vectors of a block's captions."""

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        rows = [row for one in payload["slices"] for row in self.read(one)[0]]
        vectors = [v for v in self.caption_vectors(rows, self.own(rows)) if v is not None]
        dim = self.memory.dim
        sink = io.BytesIO()
        np.save(sink, np.stack(vectors).astype(np.float32) if vectors else np.zeros((0, dim), np.float32))
        write_bytes(_queries(self.config, payload["block"]), sink.getvalue())
        return {"notes": {"ok": len(rows)}}


class TileWorker(Retrieving):
    """Writes what a shard answers to a block: where each slice's part ends, and then the candidates."""

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__(config)
        self.tiles = Tiles(self.memory, config.retrieve.against)

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        config, method = self.config, self.config.retrieve.method
        slices = [self.read(one)[0] for one in payload["slices"]]
        texts = [row["caption"] or "" for rows in slices for row in rows]
        vectors = np.zeros((len(texts), 0), np.float32)
        if method.needs_vectors:
            vectors = np.load(io.BytesIO(read_bytes(_queries(config, payload["block"]))))
        depth = min(config.retrieve.depth, self.memory.num_documents)
        tile = self.tiles.open(payload["shard"])
        rows = candidates(tile, method, texts, vectors, depth, config.guard, self.exclusion)
        rows = rows[np.argsort(rows["query"], kind="stable")]
        firsts = np.cumsum([0, *map(len, slices)])
        ends = np.zeros(BLOCK_SLICES + 1, np.int64)
        ends[: len(firsts)] = np.searchsorted(rows["query"], firsts)
        rows["query"] -= np.repeat(firsts[:-1], np.diff(ends[: len(firsts)]))  # numbered in each slice
        place = _tile(config, payload["block"], payload["shard"])
        write_bytes(place, ends.tobytes() + rows.tobytes())
        return {"notes": {"ok": len(texts)}}


def found(config: AugmentConfig, payload: dict[str, Any], queries: int, shards: int) -> list[np.ndarray]:
    """`CANDIDATE [m]` of each query of a slice, best first, of the whole memory.

    Args:
        config: of the job.
        payload: of the slice.
        queries: rows of the slice that may be trained on.
        shards: of the memory.
    """
    block, place = divmod(payload["number"], BLOCK_SLICES)
    parts = (read_part(_tile(config, block, shard), place) for shard in range(shards))
    depth = config.retrieve.depth
    return fused(config.retrieve.method, merge(parts, depth), queries, depth)


def read_part(uri: str, place: int) -> np.ndarray:
    """`CANDIDATE [n]` of one slice of a tile's file.

    Raises:
        DataError: the file has not the size that it speaks of.
    """
    fs, path = filesystem(uri)
    with fs.open_input_file(path) as file:
        head, row = 8 * (BLOCK_SLICES + 1), CANDIDATE.itemsize
        ends = np.frombuffer(file.read_at(head, 0), np.int64)
        if file.size() != head + int(ends.max()) * row:
            out = uri.rpartition(f"/{FOLDER}/")[0]
            raise DataError(f"{uri} is cut short or of another version; cure: delete {out}, and run again")
        start, end = ends[place : place + 2].tolist()
        return np.frombuffer(file.read_at((end - start) * row, head + start * row), CANDIDATE)


def _queries(config: AugmentConfig, block: int) -> str:
    return join(config.out, FOLDER, f"queries-{block:05d}.npy")


def _tile(config: AugmentConfig, block: int, shard: int) -> str:
    return join(config.out, FOLDER, f"tile-{block:05d}-{shard:05d}.bin")
