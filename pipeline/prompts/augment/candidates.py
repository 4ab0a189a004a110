"""Candidates of a block of queries in one shard, with what the guard asks of each; and the join's files of
them.

A candidate stands for itself: shards' candidates are merged, judged and chosen from without a look at the
shard.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.memory.retrieve.hits import HIT, by_query
from pipeline.memory.retrieve.retriever import Retriever
from pipeline.memory.tile import Tile, ask
from pipeline.prompts.augment.facts import guarded_documents
from pipeline.prompts.exclusion import Exclusion
from pipeline.prompts.guard import GuardConfig, GuardedDocuments

FACTS = [
    ("sha", "u8"),
    ("source", "u8"),
    ("start_s", "f8"),
    ("end_s", "f8"),
    ("phash", "u8"),
    ("evaluation", "?"),
]
CANDIDATE = np.dtype([*HIT.descr, *FACTS])
"""A hit with the guard's facts of its document: see `GuardedDocuments`."""


def candidates(
    tile: Tile,
    method: Retriever,
    texts: Sequence[str],
    vectors: np.ndarray,
    depth: int,
    guard: GuardConfig,
    exclusion: Exclusion,
) -> np.ndarray:
    """`CANDIDATE [n]`: what a shard answers to these queries (see `tile.ask`)."""
    hits = ask(tile, method, texts, vectors, depth)
    docs, place = np.unique(hits["doc"], return_inverse=True)
    table = tile.documents.take(pa.array(docs - tile.first))
    facts = guarded_documents(table, np.zeros((len(docs), 0)), guard, exclusion)
    rows = np.zeros(len(hits), CANDIDATE)
    for name in HIT.names or ():
        rows[name] = hits[name]
    columns = (facts.shas, facts.sources, facts.start_s, facts.end_s, facts.phashes, facts.evaluation)
    for (name, _), values in zip(FACTS, columns, strict=True):
        rows[name] = values[place]
    return rows


def fused(method: Retriever, merged: np.ndarray, queries: int, depth: int) -> list[np.ndarray]:
    """`CANDIDATE [m]` of each query, best first, of all shards' merged lists."""
    return [method.fuse(rows, depth)[:depth] for rows in by_query(merged, queries)]


def guarded_candidates(rows: np.ndarray, vectors: np.ndarray) -> GuardedDocuments:
    """What the guard asks of candidates; with their unit picture vectors, float `m d`."""
    facts = {f"{name}s": rows[name] for name in ("sha", "source")}
    return GuardedDocuments(
        **facts,
        start_s=rows["start_s"],
        end_s=rows["end_s"],
        phashes=rows["phash"],
        vectors=vectors,
        evaluation=rows["evaluation"],
    )
