"""Recall@k of a vector search against the exact answer, with a lower bound that can be trusted."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.memory.store import stream_vectors

Z_95 = 2.128045234184983
"""One-sided quantile of the normal distribution at 1 - 0.05 / 3: a build may put up to three settings to
the test, and all three bounds hold together in 95 of 100 builds (Bonferroni)."""
TIE = 1e-4
"""Cosines closer than this are equal: float16 vectors don't resolve more."""


@dataclass(frozen=True)
class Exact:
    """The true neighbours of a sample of queries."""

    queries: np.ndarray
    """float32 `q d`, unit rows."""
    own_ids: list[str]
    """The document that each query was taken from; it doesn't count as its own neighbour."""
    neighbours: list[dict[str, float]]
    """doc_id -> cosine of the best documents of each query: k and then some, for ties."""
    bars: np.ndarray
    """float64 `q`: the k-th best cosine."""


def exact_neighbours(
    blocks: Iterable[tuple[pa.Array, np.ndarray]], queries: np.ndarray, own_ids: Sequence[str], *, k: int
) -> Exact:
    """Brute force over streamed blocks of (doc_id, float16 `n d`); memory is bounded by one block."""
    keep = 2 * k + 8  # room for the query's own document and for ties at the k-th place
    scores = np.full((len(queries), 0), -np.inf, np.float32)
    ids = np.empty((len(queries), 0), object)
    for block_ids, block in blocks:
        found = queries @ unit(block).T
        names = np.asarray(block_ids.to_numpy(zero_copy_only=False), object)
        best = _top(found, keep)
        scores = np.concatenate([scores, np.take_along_axis(found, best, 1)], axis=1)
        ids = np.concatenate([ids, names[best]], axis=1)
        best = _top(scores, keep)
        scores, ids = np.take_along_axis(scores, best, 1), np.take_along_axis(ids, best, 1)
    neighbours, bars = [], []
    for own, row_ids, row_scores in zip(own_ids, ids, scores, strict=True):
        others = {n: float(s) for n, s in zip(row_ids, row_scores, strict=True) if n != own}
        neighbours.append(others)
        ranked = sorted(others.values(), reverse=True)
        bars.append(ranked[min(k, len(ranked)) - 1] if ranked else -math.inf)
    return Exact(queries, list(own_ids), neighbours, np.asarray(bars))


def hits(exact: Exact, answers: Sequence[Sequence[str]], *, k: int) -> np.ndarray:
    """Recall of each query: the share of its k true neighbours (or equals of the k-th) among the answers."""
    found = np.zeros(len(answers))
    for i, answer in enumerate(answers):
        truth, own = exact.neighbours[i], exact.own_ids[i]
        wanted = min(k, len(truth))
        others = [doc_id for doc_id in answer if doc_id != own][:k]
        good = sum(truth.get(doc_id, -math.inf) >= exact.bars[i] - TIE for doc_id in others)
        found[i] = min(good, wanted) / wanted if wanted else 1.0
    return found


def lower_bound(recalls: np.ndarray, *, z: float = Z_95) -> float:
    """One-sided 95 % lower bound of the mean recall.

    Wilson's bound with as many trials as *queries*: a mean of values in [0, 1] varies at most like a
    coin of the same mean (Bhatia and Davis 2000), so this holds however the hits of one query hang
    together. (Counting every one of the k hits as a trial would promise too much.)
    """
    n, p = len(recalls), float(np.mean(recalls)) if len(recalls) else 0.0
    if not n:
        return 0.0
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n))


def queries_for(bound: float) -> int:
    """How many queries with full recall are needed before `lower_bound` can reach `bound`."""
    return math.ceil(Z_95 * Z_95 * bound / max(1 - bound, 1e-9))


def sample_queries(table: Any, column: str, doc_ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The vectors of these documents, float32 `q d` of unit norm, and their ids (those that have one)."""
    from pipeline.memory.store import id_filter, vectors_numpy

    vectors, ids = [], []
    for start in range(0, len(doc_ids), 512):
        chunk = doc_ids[start : start + 512]
        rows = table.search().where(id_filter(chunk)).select(["doc_id", column]).limit(len(chunk))
        rows = rows.to_arrow().sort_by("doc_id").combine_chunks()
        rows = rows.filter(rows[column].is_valid())
        for part in rows.to_batches():
            vectors.append(unit(vectors_numpy(part[column])))
            ids += part["doc_id"].to_pylist()
    dim = table.schema.field(column).type.list_size
    return np.concatenate(vectors) if vectors else np.empty((0, dim), np.float32), ids


def unit(vectors: np.ndarray) -> np.ndarray:
    """Float32 rows of length 1; a zero row stays zero."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def table_blocks(table: Any, column: str) -> Iterable[tuple[pa.Array, np.ndarray]]:
    return stream_vectors(table, column)


def _top(scores: np.ndarray, keep: int) -> np.ndarray:
    """Column numbers of the `keep` best of each row, in no order."""
    if scores.shape[1] <= keep:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.argpartition(scores, scores.shape[1] - keep, axis=1)[:, -keep:]
