"""A 64-bit perceptual hash of a picture, in numpy alone.

Grey -> 32x32 by exact area average -> two-dimensional DCT-II -> one bit for each of the 64 lowest
frequencies but the mean: is it above their median? (the classic "pHash" of Zauner, 2010).
Brightness, contrast, size and compression hardly move it; another picture differs in ~32 bits.
"""

from functools import lru_cache

import numpy as np

SIDE = 32
NUM_BITS = 64
FLAT = 1e-6
"""A coefficient below this share of full contrast is rounding noise: a flat picture hashes to 0."""


def phash64(rgb: np.ndarray) -> int:
    """Perceptual hash of one picture.

    Args:
        rgb: uint8 `h w 3`, or `h w` for grey.

    Returns:
        An int in [0, 2**64); 0 for a picture of one colour.
    """
    grey = rgb.astype(np.float32)
    if grey.ndim == 3:
        grey = grey @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 luma
    height, width = grey.shape
    small = _area_weights(height) @ grey @ _area_weights(width).T
    spectrum = _dct_matrix() @ small @ _dct_matrix().T
    low = spectrum[_lowest_frequencies()]
    low[np.abs(low) < FLAT * 255 * SIDE] = 0.0
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hamming(a: int, b: int) -> int:
    """How many of the 64 bits differ: 0 = same picture, about 32 = unrelated."""
    return (a ^ b).bit_count()


@lru_cache(maxsize=1)
def mirror_mask() -> int:
    """XOR a hash with this to get about the hash of the picture mirrored left to right.

    Mirroring changes the sign of the odd horizontal frequencies. Exact where the median coefficient is
    0; else the few coefficients that are smaller than the median keep the wrong bit.
    """
    _, columns = _lowest_frequencies()
    return int.from_bytes(np.packbits(columns % 2 == 1).tobytes(), "big")


@lru_cache(maxsize=64)
def _area_weights(size: int) -> np.ndarray:
    """Weights `32 size` that average `size` samples into 32 cells, each cell an exact share."""
    edges = np.arange(SIDE + 1) * (size / SIDE)
    samples = np.arange(size)
    upper = np.minimum(edges[1:, None], samples[None, :] + 1)
    lower = np.maximum(edges[:-1, None], samples[None, :])
    weights = np.clip(upper - lower, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=1)
def _dct_matrix() -> np.ndarray:
    """Orthonormal DCT-II, `32 32`: row k is the cosine of frequency k."""
    k, n = np.mgrid[0:SIDE, 0:SIDE]
    matrix = np.sqrt(2 / SIDE) * np.cos(np.pi * (n + 0.5) * k / SIDE)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


@lru_cache(maxsize=1)
def _lowest_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Row and column indices of the 64 lowest frequencies, the mean (0, 0) left out."""
    order = sorted((u + v, abs(u - v), u, v) for u in range(SIDE) for v in range(SIDE))
    rows, columns = zip(*[(u, v) for _, _, u, v in order[1 : NUM_BITS + 1]], strict=True)
    return np.array(rows), np.array(columns)
