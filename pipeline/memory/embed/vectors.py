"""Arithmetic of unit vectors, float32, rows: what a document's three vectors are made by."""

from collections.abc import Sequence

import numpy as np


def frame_mean(frames: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Normalise, mean, normalise over each run of `counts` rows (RAGME): `sum(counts) d` -> `n d`."""
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(unit_rows(frames), starts, axis=0)
    return unit_rows(sums / np.asarray(counts, np.float32)[:, None])


def document_vector(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """RA-CM3 (arXiv 2211.12561): the normalised mean of the two unit vectors."""
    return unit_rows((image + text) / 2)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12)
