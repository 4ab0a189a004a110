"""Unit vectors: in Arrow and numpy, cosines, means, and a choice of ones that differ."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def vectors_numpy(array: pa.Array) -> np.ndarray:
    """A FixedSizeList<float16> array as float16 `n d`, without a copy where none is missing; else zero rows."""
    dim = array.type.list_size
    if not array.null_count:
        return np.asarray(array.flatten()).reshape(len(array), dim)
    vectors = np.zeros((len(array), dim), np.float16)
    vectors[array.is_valid().to_numpy(zero_copy_only=False)] = np.asarray(array.flatten()).reshape(-1, dim)
    return vectors


def vectors_arrow(vectors: np.ndarray) -> pa.Array:
    """Float `n d` as FixedSizeList<float16>."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Float32 rows of length 1; a zero row stays zero."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cosines(vectors: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products of the rows of `vectors` (`m d`, unit) with `other` (`d` or `m d`, unit), float64.

    Each row by itself: a matrix product's last bits depend on how many rows there are, these don't.
    """
    wide = vectors if vectors.dtype == np.float64 else np.asarray(vectors, np.float32).astype(np.float64)
    return (wide * np.asarray(other, np.float32)).sum(axis=-1)


def spread(vectors: np.ndarray, k: int, *, max_similarity: float) -> tuple[list[int], int]:
    """Choose the first `k` candidates of which none is too similar to one chosen before.

    Args:
        vectors: unit picture embeddings of the candidates, best first, `m d`; zero rows are similar to nothing.
        k: how many to choose.
        max_similarity: a candidate above this cosine with a chosen one is skipped.

    Returns:
        Places of the chosen; how many before the last of them were skipped.
    """
    chosen: list[int] = []
    for place in range(len(vectors)):
        if len(chosen) == k:
            return chosen, place - k
        if not chosen or cosines(vectors[chosen], vectors[place]).max() <= max_similarity:
            chosen.append(place)
    return chosen, len(vectors) - len(chosen)


def frame_mean(frames: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Normalise, mean, normalise over each run of `counts` rows (RAGME): `sum(counts) d` -> `n d`."""
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(unit(frames), starts, axis=0)
    return unit(sums / np.asarray(counts, np.float32)[:, None])


def document_vector(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """RA-CM3 (arXiv 2211.12561): the normalised mean of the two unit vectors."""
    return unit((image + text) / 2)
