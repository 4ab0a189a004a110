"""Approximate nearest documents for whole batches of queries, held to a declared recall.

The documents' vectors fall into about sqrt(n) partitions (spherical k-means); a query looks into the few
whose centres are nearest. What makes it fast is the batch: queries are grouped by the partition that they
look into, so each partition is read and widened once and compared with all of them by one matrix product.
How many partitions a query looks into is not guessed: the least number is taken that meets the recall on
a sample of the queries' own kind, by its 95 % lower bound (`pipeline.memory.recall`).

Scores are exact (float64, row by row, as in `dense`); only who is looked at is approximate. The centres
come from matrix products, whose last bits differ between kinds of CPU, so machines of different kinds may
draw a border differently: where shards must be the same on all of them, search exactly (`dense`).
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from pipeline.memory.recall import lower_bound, queries_for
from pipeline.memory.retrieve.bm25 import Hits
from pipeline.memory.retrieve.dense import rank

PARTITIONS_PER_ROOT = 2.0
"""Partitions for each unit of sqrt(n): more are finer and take longer to build."""
SAMPLE_PER_CENTRE, ROUNDS = 32, 5
"""Vectors of each centre's share of the k-means sample, and its iterations: more gain little here."""
BATCH = 2048
"""Queries that are grouped at once: enough that most partitions serve many of them."""
ROWS = 1 << 14
"""Documents that are compared with all centres at once: bounds the memory."""
SPARE = 8
"""Candidates beyond `depth` of each partition, whose order float32 may have got wrong."""


@dataclass(frozen=True)
class Partitions:
    """Documents by partition; float32 copies of their vectors lie in this order in memory."""

    vectors: np.ndarray
    """float16 or float32 `n d`, unit rows, in the order of the documents' numbers; may be memory-mapped."""
    centres: np.ndarray
    """float32 `p d`."""
    order: np.ndarray
    """int64 `n`: numbers of the documents, partition by partition, ascending in each."""
    starts: np.ndarray
    """int64 `p + 1`: where each partition begins in `order`."""
    sorted: np.ndarray
    """float32 `n d`: the vectors in `order`."""
    probes: int = 1
    """Partitions that a query looks into."""

    @classmethod
    def build(cls, vectors: np.ndarray, *, seed: int = 0) -> Self:
        """Partition the documents (`n d`, at least one)."""
        count = len(vectors)
        number = max(1, min(count, round(PARTITIONS_PER_ROOT * math.sqrt(count))))
        random = np.random.default_rng(seed)
        some = np.sort(random.choice(count, min(count, number * SAMPLE_PER_CENTRE), replace=False))
        centres = _centres(_wide(vectors[some]), number, random)
        member = np.empty(count, np.int64)
        for start in range(0, count, ROWS):
            member[start : start + ROWS] = _nearest(_wide(vectors[start : start + ROWS]), centres)
        order = np.argsort(member, kind="stable")
        starts = np.searchsorted(member[order], np.arange(number + 1))
        wide = np.empty(vectors.shape, np.float32)
        for start in range(0, count, ROWS):
            wide[start : start + ROWS] = _wide(vectors[order[start : start + ROWS]])
        return cls(vectors, centres, order, starts, wide)

    def tuned(self, asked: np.ndarray, *, k: int = 10, recall: float, seed: int = 0) -> Self:
        """These partitions with the least probes that meet the recall@k by its 95 % lower bound.

        Looking into all of them is exact, so there is always an answer.

        Args:
            asked: float `q d`, vectors of the kind that will ask; a sample of them does.
            k: neighbours that the recall is about.
            recall: what the lower bound must reach.
            seed: of the sample.
        """
        some = np.random.default_rng(seed).permutation(len(asked))[: 2 * queries_for(recall)]
        queries = _wide(asked[np.sort(some)])
        exact = replace(self, probes=len(self.centres)).search(queries, k)
        probes = 1
        while probes < len(self.centres) and len(queries) >= queries_for(recall):
            found = replace(self, probes=probes).search(queries, k)
            recalls = [np.isin(e.docs, a.docs).mean() for a, e in zip(found, exact, strict=True)]
            if lower_bound(np.array(recalls)) >= recall:
                return replace(self, probes=probes)
            probes = max(probes + 1, round(probes * 1.3))
        return replace(self, probes=len(self.centres))

    def search(self, queries: np.ndarray, depth: int) -> list[Hits]:
        """The `depth` best documents of each query among those it looks at.

        Args:
            queries: float32 `q d`, unit norm.
            depth: documents wanted of each.
        """
        from threadpoolctl import threadpool_limits

        # One thread a partition: two threads that share products of this size wait for each other.
        threads = os.cpu_count() or 1
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
            pieces = (queries[start : start + BATCH] for start in range(0, len(queries), BATCH))
            return [
                hits for piece in pieces for hits in self._search(np.asarray(piece, np.float32), depth, pool)
            ]

    def _search(self, queries: np.ndarray, depth: int, pool: ThreadPoolExecutor) -> list[Hits]:
        queries = np.asarray(queries, np.float32)
        count, probes = len(queries), min(self.probes, len(self.centres))
        # Float64: where a query looks must not hang on how many are asked with it.
        near = _top(queries.astype(np.float64) @ self.centres.T.astype(np.float64), probes).reshape(-1)
        asked = np.argsort(near, kind="stable")  # (query, probe) pairs, partition by partition
        bounds = np.searchsorted(near[asked], np.arange(len(self.centres) + 1))
        keep = depth + SPARE
        docs = np.full((count * probes, keep), -1, np.int64)
        scores = np.full((count * probes, keep), -np.inf, np.float32)

        def look(part: int) -> None:
            members = self.order[self.starts[part] : self.starts[part + 1]]
            pairs = asked[bounds[part] : bounds[part + 1]]
            products = queries[pairs // probes] @ self.sorted[self.starts[part] : self.starts[part + 1]].T
            best = _top(products, min(keep, len(members)))
            scores[pairs, : best.shape[1]] = np.take_along_axis(products, best, 1)
            docs[pairs, : best.shape[1]] = members[best]

        wanted = np.flatnonzero((np.diff(bounds) > 0) & (np.diff(self.starts) > 0))
        list(pool.map(look, wanted.tolist()))
        docs, scores = docs.reshape(count, -1), scores.reshape(count, -1)
        chosen = np.take_along_axis(docs, _top(scores, min(keep, scores.shape[1])), 1)
        near = np.flatnonzero(chosen.reshape(-1) >= 0)
        row = np.repeat(np.arange(count), chosen.shape[1])[near]
        return rank(self.vectors, queries, row, chosen.reshape(-1)[near], depth)


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` best of each row, in no order."""
    if count >= scores.shape[1]:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.argpartition(scores, scores.shape[1] - count, axis=1)[:, -count:]


def _centres(some: np.ndarray, number: int, random: np.random.Generator) -> np.ndarray:
    """Spherical k-means of unit rows: float32 `number d`. A centre without members stays where it was."""
    centres = some[np.sort(random.choice(len(some), number, replace=False))]
    for _ in range(ROUNDS):
        member = np.concatenate([_nearest(some[i : i + ROWS], centres) for i in range(0, len(some), ROWS)])
        order = np.argsort(member, kind="stable")
        there, first = np.unique(member[order], return_index=True)
        sums = np.add.reduceat(some[order], first, axis=0)
        centres = centres.copy()
        centres[there] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return centres


def _nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    import torch

    return (torch.from_numpy(rows) @ torch.from_numpy(centres).T).argmax(dim=1).numpy()


def _wide(rows: np.ndarray) -> np.ndarray:
    """Float32, by torch: numpy is slow on float16."""
    import torch

    return torch.from_numpy(np.array(rows)).float().numpy()


def sampled(vectors: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """Float32 rows of some documents, for `tuned`."""
    some = np.random.default_rng(seed).choice(len(vectors), min(count, len(vectors)), replace=False)
    return _wide(vectors[np.sort(some)])
