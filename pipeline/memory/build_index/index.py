"""LanceDB's indexes for interactive search: ids, and approximate vectors that are held to a declared recall.

    segments   a shard's column -> its part of an index; the exact neighbours of sampled captions     (workers)
    commit     an index is its segments: one commit of metadata                                       (driver)
    recall     what an index answers, beside the exact neighbours                                     (workers)

The join needs no index of vectors, and what it makes doesn't depend on one. Each segment is trained by itself
and a search asks all of them, so a memory that grows gets further ones, and nothing old is indexed again. Below
the declared floor of recall the build stops with all embeddings in place, and says what would have met it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from pydantic import Field

from infra.config import Config
from infra.errors import DataError
from infra.storage import join, read_bytes, write_bytes
from pipeline.journal import Receipt, Unit
from pipeline.memory.retrieve import RETRIEVERS
from pipeline.memory.retrieve.hits import HIT, by_query, merge
from pipeline.memory.search import nearest
from pipeline.memory.store import EMBEDDINGS, Memory, lance_dataset, open_table, uncertified
from pipeline.memory.tile import Tile, ask
from pipeline.memory.vectors import cosines, unit, vectors_numpy
from pipeline.schema import content_id

K, QUERIES = 10, 200
LADDER = ((20, 20), (60, 60), (200, 200), (1000, 500))
"""(partitions that are read, times k candidates that are scored again on the stored vectors): the first that
meets the floor is taken. Ours."""
ID, EXACT = "doc_id", "exact"
Run = Callable[[str, Sequence[Unit], Callable[[], Any]], list[Receipt]]
"""Runs units (what they are, which, who makes their worker) and gives their receipts, in order."""


class IndexConfig(Config):
    """Approximate search by vectors."""

    columns: tuple[Literal["image_embedding", "text_embedding", "document_embedding"], ...] = EMBEDDINGS
    """Embedding columns that get an index; searching another one scans it exactly."""
    min_rows: int = Field(default=1_000_000, ge=1)
    """Smaller memories get none: an exact scan of them takes about a second. Ours."""
    recall: float = Field(default=0.95, ge=0, lt=1)
    """Floor of the mean recall@10 of a sample of captions. Ours."""


def is_held(indexes: dict[str, Any], config: IndexConfig, documents: int) -> bool:
    """Whether a certificate's indexes have all that is asked for."""
    columns = config.columns if documents >= config.min_rows else ()
    return all(column in indexes and indexes[column]["recall"] >= config.recall for column in columns)


def build_indexes(out: str, build: str, facts: dict[str, Any], config: IndexConfig, run: Run) -> dict[str, Any]:
    """Index the table at its latest version, and measure.

    Args:
        out: the memory.
        build: folder of the build.
        facts: of the certificate that the memory gets.
        config: what the index must reach.
        run: runs the workers.

    Returns:
        Facts for the certificate, by column: effort and recall.

    Raises:
        DataError: a recall below the floor.
    """
    memory = uncertified(out, facts)
    columns = config.columns if memory.num_documents >= config.min_rows else ()
    work = partial(Indexer, out, build, facts)
    written = run("index for search", _segment_units(memory, columns), work)
    _commit(out, [receipt["segment"] for receipt in written if receipt["segment"]])
    if not columns:
        return {}
    key = (memory.version, config.recall, str(LADDER))
    units = [Unit(content_id("recall", column, *key), {"column": column}) for column in columns]
    reached = run("recall of the index", units, partial(RecallMeter, out, build, facts, config.recall, LADDER))
    return {
        column: _held(column, receipt, config.recall) for column, receipt in zip(columns, reached, strict=True)
    }


def _segment_units(memory: Memory, columns: Sequence[str]) -> list[Unit]:
    """A unit a shard and column; those that have their segment already are met for the recall alone."""
    there = _indexed(memory.uri)
    units = []
    for column in (ID, *columns):
        for number, shard in enumerate(memory.shards):
            is_new = shard.fragment not in there.get(column, set())
            if is_new or column != ID:
                key = content_id("segment", column, shard.name, memory.version)
                units.append(Unit(key, {"column": column, "shard": number, "is_new": is_new}))
    return units


def _indexed(out: str) -> dict[str, set[int]]:
    """Column -> fragments that its index holds."""
    return {
        index.field_names[0]: {fragment for segment in index.segments for fragment in segment.fragment_ids}
        for index in lance_dataset(out).describe_indices()
    }


@dataclass(frozen=True)
class Measuring:
    """What the workers of an index know."""

    out: str
    build: str
    facts: dict[str, Any]

    @cached_property
    def memory(self) -> Memory:
        return uncertified(self.out, self.facts)

    @cached_property
    def queries(self) -> np.ndarray:
        """Vectors of some of the memory's own captions, float32 `q d`."""
        return unit(vectors_numpy(self.memory.sample["text_embedding"].combine_chunks())[:QUERIES])

    def exact(self, column: str, shard: str) -> str:
        """Place of the exact neighbours in one shard."""
        return join(self.build, EXACT, f"{column}-{shard}.bin")


class Indexer(Measuring):
    """The worker: a shard and a column in, a segment of the column's index out."""

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        column, number = payload["column"], payload["shard"]
        shard = self.memory.shards[number]
        if column != ID:
            tile = Tile(self.memory, column.removesuffix("_embedding"), number)
            rows = ask(tile, RETRIEVERS["clip"], [""] * len(self.queries), self.queries, K)
            write_bytes(self.exact(column, shard.name), rows.tobytes())
        return {"segment": self._segment(column, shard.fragment) if payload["is_new"] else None}

    def _segment(self, column: str, fragment: int) -> dict[str, Any]:
        """Write a segment beside the table; what a commit of it needs to know."""
        if column == ID:
            kind, options = "BTREE", {}
        elif self.memory.dim % 8:  # RaBitQ packs eight dimensions into a byte
            kind, options = "IVF_FLAT", {"metric": "cosine"}
        else:
            kind, options = "IVF_RQ", {"metric": "cosine", "num_bits": 1}
        made = self.memory.dataset.create_index_uncommitted(
            column, kind, name=f"{column}_idx", replace=True, fragment_ids=[fragment], **options
        )
        kept = {
            name: getattr(made, name) for name in ("uuid", "name", "fields", "dataset_version", "index_version")
        }
        kind, details = made.index_details
        return {**kept, "column": column, "fragment": fragment, "index_details": [kind, details.hex()]}


def _commit(out: str, segments: Sequence[dict[str, Any]]) -> None:
    """Make these segments part of their columns' indexes, but for those that an earlier commit did."""
    from lance import Index
    from lance.bitmap import Bitmap

    there = _indexed(out)
    fresh: dict[str, list[Any]] = {}
    for told in segments:
        column, fragment = told.pop("column"), told.pop("fragment")
        kind, details = told.pop("index_details")
        if fragment not in there.get(column, set()):
            made = Index(**told, fragment_ids=Bitmap({fragment}), index_details=(kind, bytes.fromhex(details)))
            fresh.setdefault(column, []).append(made)
    for column, made in fresh.items():
        lance_dataset(out).commit_existing_index_segments(f"{column}_idx", column, made)


@dataclass(frozen=True)
class RecallMeter(Measuring):
    """The worker: a column in, the recall of its index at growing efforts out, until the floor is met."""

    floor: float
    ladder: Sequence[tuple[int, int]]

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        column, memory, queries = payload["column"], self.memory, self.queries
        parts = (np.frombuffer(read_bytes(self.exact(column, s.name)), HIT) for s in memory.shards)
        exact = by_query(merge(parts, K), len(queries))
        table, reached = open_table(self.out), []
        for effort in self.ladder:
            found = nearest(memory, table, column, queries, K, effort=effort)
            reached.append(round(recall(memory, column, queries, exact, [hits.docs for hits in found]), 4))
            if reached[-1] >= self.floor:
                break
        return {"recall": reached, "queries": len(queries)}


def recall(
    memory: Memory, column: str, queries: np.ndarray, exact: list[np.ndarray], found: list[np.ndarray]
) -> float:
    """Mean share of the best scores that was found; among equal scores any document is right.

    A caption that many clips share has more nearest documents than are asked for.
    """
    vectors = vectors_numpy(memory.take(np.concatenate(found).tolist(), [column])[column].combine_chunks())
    asked = np.repeat(queries, [len(docs) for docs in found], axis=0)
    scores = cosines(vectors, asked).astype(np.float32)  # as the exact search rounds them
    each = np.split(scores, np.cumsum([len(docs) for docs in found])[:-1])
    reached = [(s >= b["score"].min()).sum() / len(b) for s, b in zip(each, exact, strict=True) if len(b)]
    return float(np.mean(reached)) if reached else 1.0


def _held(column: str, receipt: Receipt, floor: float) -> dict[str, Any]:
    """The least effort that meets the floor."""
    reached = receipt["recall"]
    if reached[-1] >= floor:
        effort = LADDER[len(reached) - 1]
        return {"effort": effort, "recall": reached[-1], "floor": floor, "queries": receipt["queries"]}
    raise DataError(
        f"recall@{K} of {column}: {reached[-1]:.4f} with {LADDER[-1][0]} probes, declared {floor}; "
        f"cure: index.recall={max(reached[-1] - 0.01, 0):.2f}, or leave it out of index.columns (exact, slower)"
    )
