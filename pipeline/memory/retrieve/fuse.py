"""Merging ranked lists, and keeping the chosen documents apart: pure functions over arrays."""

from collections.abc import Sequence

import numpy as np

from pipeline.memory.retrieve.bm25 import Hits

RRF_K = 60
"""Cormack, Clarke & Buettcher (2009); LanceDB's default as well."""


def reciprocal_rank(
    lists: Sequence[Hits], depth: int, *, weights: Sequence[float] | None = None, k: int = RRF_K
) -> Hits:
    """Reciprocal rank fusion: score(d) = sum over lists of weight / (k + rank of d), exact.

    Args:
        lists: ranked documents, best first.
        depth: documents wanted.
        weights: one a list; None = 1 each, as in the paper.
        k: the paper's constant.

    Returns:
        The best `depth`; equal scores in order of document number.
    """
    docs = np.concatenate([hits.docs for hits in lists])
    gains = [
        weight / (k + 1 + np.arange(len(hits)))
        for weight, hits in zip(weights or [1.0] * len(lists), lists, strict=True)
    ]
    unique, inverse = np.unique(docs, return_inverse=True)
    scores = np.bincount(inverse, np.concatenate(gains), minlength=len(unique))
    order = np.lexsort((unique, -scores))[:depth]
    return Hits(unique[order].astype(np.int32), scores[order])


def cosines(vectors: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products of the rows of `vectors` (`m d`) with `other` (`d`), float64.

    Row by row, so that the last bits don't depend on how many rows there are.
    """
    rows = np.asarray(vectors, np.float32).astype(np.float64)
    return (rows * np.asarray(other, np.float32)).sum(axis=-1)


def spread(
    scores: np.ndarray,
    vectors: np.ndarray,
    k: int,
    *,
    max_similarity: float,
    mmr_lambda: float = 1.0,
) -> tuple[list[int], int]:
    """Choose `k` candidates, best first, none too similar to one chosen before.

    Args:
        scores: candidates' scores, best first, `m`.
        vectors: their unit picture embeddings, `m d`; zero rows are similar to nothing.
        k: how many to choose.
        max_similarity: a candidate above this cosine with a chosen one is skipped (RA-CM3: 0.9).
        mmr_lambda: 1 = by score alone; below, maximal marginal relevance (Carbonell & Goldstein,
            1998): lambda * relevance - (1 - lambda) * largest similarity to the chosen, where
            relevance is the score scaled to [0, 1] over these candidates.

    Returns:
        Places of the chosen, in order of choice; how many were skipped as too similar to one of them.
    """
    if mmr_lambda >= 1.0:
        return _in_order(vectors, k, max_similarity)
    low, high = (scores.min(), scores.max()) if len(scores) else (0.0, 0.0)
    relevance = (scores - low) / (high - low) if high > low else np.ones(len(scores))
    nearest = np.full(len(scores), -1.0)  # largest cosine with a chosen candidate
    free, chosen, skipped = np.ones(len(scores), bool), [], 0
    while len(chosen) < k and free.any():
        value = mmr_lambda * relevance - (1 - mmr_lambda) * np.maximum(nearest, 0.0)
        best = int(np.argmax(np.where(free, value, -np.inf)))
        chosen.append(best)
        free[best] = False
        nearest = np.maximum(nearest, cosines(vectors, vectors[best]))
        skipped += int((free & (nearest > max_similarity)).sum())
        free &= nearest <= max_similarity
    return chosen, skipped


def _in_order(vectors: np.ndarray, k: int, max_similarity: float) -> tuple[list[int], int]:
    """The first k candidates of which none is too similar to one before."""
    chosen: list[int] = []
    for place in range(len(vectors)):
        if len(chosen) == k:
            return chosen, place - k
        if not chosen or cosines(vectors[chosen], vectors[place]).max() <= max_similarity:
            chosen.append(place)
    return chosen, len(vectors) - len(chosen)
