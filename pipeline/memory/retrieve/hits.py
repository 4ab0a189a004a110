"""Ranked documents: of one query in one shard, and of many queries over all shards, in one total order.

A document's number is its row in the table; equal scores are ordered by `key`, the first 64 bits of its id, and
then by number. So the answer is the same however the memory is cut into shards and the queries into blocks.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

HIT = np.dtype(
    [("query", "i8"), ("kind", "u1"), ("score", "f8"), ("key", "u8"), ("doc", "i8"), ("second", "f8")]
)
"""One document of one ranked list: whose query, which of the retriever's lists, and where it stands."""


@dataclass(frozen=True)
class Hits:
    """Ranked documents of one query, best first."""

    docs: np.ndarray  # int64 [n] rows of the shard that was asked, or numbers of documents
    scores: np.ndarray  # float64 [n]
    keys: np.ndarray  # uint64 [n]
    second: np.ndarray | None = (
        None  # float64 [n] what a second look says of each, for `Retriever.fuse`; None = 0
    )

    def __len__(self) -> int:
        return len(self.docs)


NOTHING = Hits(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.uint64))


def ranked(docs: np.ndarray, scores: np.ndarray, keys: np.ndarray, depth: int) -> Hits:
    """The `depth` best, equal scores in order of key.

    Args:
        docs: int `n`, rows of the shard.
        scores: `n`.
        keys: uint64, of all documents of the shard.
        depth: documents wanted.
    """
    if len(docs) > depth:
        bound = np.partition(scores, len(scores) - depth)[len(scores) - depth]
        inside = scores >= bound
        docs, scores = docs[inside], scores[inside]
    order = np.lexsort((docs, keys[docs], -scores))[:depth]
    docs = docs[order].astype(np.int64)
    return Hits(docs, scores[order].astype(np.float64), keys[docs])


def flatten(lists: Sequence[Sequence[Hits]], first: int = 0) -> np.ndarray:
    """`HIT [n]` of answers: a list for each kind of score, in it one `Hits` a query.

    Args:
        lists: kind, query.
        first: number of the shard's first document.
    """
    parts = [(q, kind, hits) for kind, every in enumerate(lists) for q, hits in enumerate(every)]
    found = np.zeros(sum(len(hits) for *_, hits in parts), HIT)
    if len(found):
        sizes = [len(hits) for *_, hits in parts]
        found["query"] = np.repeat([q for q, *_ in parts], sizes)
        found["kind"] = np.repeat([kind for _, kind, _ in parts], sizes)
        found["score"] = np.concatenate([hits.scores for *_, hits in parts])
        found["key"] = np.concatenate([hits.keys for *_, hits in parts])
        found["doc"] = np.concatenate([hits.docs for *_, hits in parts]) + first
        found["second"] = np.concatenate(
            [np.zeros(len(h)) if h.second is None else h.second for *_, h in parts]
        )
    return found


def merge(parts: Iterable[np.ndarray], depth: int) -> np.ndarray:
    """The first `depth` of each query and kind over all shards, ordered by query, kind and rank.

    Args:
        parts: `HIT [n]`, or a type with more fields, of each shard; one at a time is held beside the best so
            far.
        depth: documents wanted of each list.
    """
    best: np.ndarray | None = None
    for part in parts:
        rows = part if best is None else np.concatenate([best, part])
        names = ("doc", "key", "score", "kind", "query")
        rows = rows[np.lexsort([-rows[name] if name == "score" else rows[name] for name in names])]
        lists = np.stack([rows["query"], rows["kind"].astype(np.int64)])
        starts = np.flatnonzero(np.any(np.diff(lists, prepend=-1), axis=0))
        place = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
        best = rows[place < depth]
    return np.zeros(0, HIT) if best is None else best


def by_query(rows: np.ndarray, queries: int) -> list[np.ndarray]:
    """The rows of each query, of rows that are ordered by query."""
    ends = np.searchsorted(rows["query"], np.arange(queries + 1))
    return [rows[start:end] for start, end in itertools.pairwise(ends)]
