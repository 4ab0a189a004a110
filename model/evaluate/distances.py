"""Distances of two sets of features: Fréchet's (FID, FVD) by running moments, the kernel's (KID, KVD).

    d² = |m₁ - m₂|² + tr C₁ + tr C₂ - 2 tr (C₁^½ C₂ C₁^½)^½        Dowson and Landau 1982; Heusel et al. 2017

The last trace is the sum of the singular values of C₁^½ C₂^½, each root taken by a symmetric
eigendecomposition in float64: no complex numbers, no NaN at low rank, and 0 of a set against itself.

    MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y),   k(x, y) = (x·y / d + 1)³      Binkowski et al., 1801.01401

The kernel's is unbiased, so that its mean doesn't depend on n. All pairs are taken, in place of the usual
hundred random subsets, whose mean has the same expectation.
"""

from collections.abc import Sequence

import numpy as np

from infra.errors import DataError

LIMIT = 2.0**10
"""Features are smaller than this; I3D's logits stay below 100, Inception's pool below 20."""
COARSE, FINE = 2.0**6, 2.0**22
"""A feature is held as a multiple of 1/FINE (2.4e-7), in two halves that meet at 1/COARSE."""
MOST_ROWS = 2**21
"""So many products of halves add up without rounding: 32 bits each, of a float64's 53."""


class Moments:
    """Number, sum and sum of outer products of feature vectors: the same to the last bit in any order.

    Every feature is cut into two halves of 16 bits, whose products a float64 adds up without rounding. So the
    order of the videos, the size of the batches and how many workers' moments are merged can't be seen.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.n = dim, 0
        self.total = np.zeros((2, dim))
        """Of the coarse and of the fine halves."""
        self.products = np.zeros((3, dim, dim))
        """Coarse with coarse, coarse with fine, fine with fine."""

    def add(self, features: np.ndarray) -> None:
        """Add rows `n d`.

        Raises:
            DataError: a number that is not finite or too large, or more rows than add up exactly.
        """
        x = np.asarray(features, np.float64)
        if x.shape[1] != self.dim or not (np.abs(x) < LIMIT).all():
            raise DataError(f"features {list(x.shape)}, expected finite ones below {LIMIT:g}, {self.dim} a row")
        coarse = np.round(x * COARSE) / COARSE
        fine = np.round((x - coarse) * FINE) / FINE
        self._grow(len(x))
        self.total += np.stack([coarse.sum(0), fine.sum(0)])
        self.products += np.stack([coarse.T @ coarse, coarse.T @ fine, fine.T @ fine])

    def merge(self, other: "Moments") -> None:
        """Add what another has seen."""
        self._grow(other.n)
        self.total += other.total
        self.products += other.products

    def without(self, other: "Moments") -> "Moments":
        """Of the rows that are not in `other`, which are a part of these."""
        rest = Moments(self.dim)
        rest.n = self.n - other.n
        rest.total, rest.products = self.total - other.total, self.products - other.products
        return rest

    def _grow(self, rows: int) -> None:
        self.n += rows
        if self.n > MOST_ROWS:
            raise DataError(f"{self.n:,} feature vectors, more than the {MOST_ROWS:,} that add up exactly")

    @property
    def mean(self) -> np.ndarray:
        return self.total.sum(0) / self.n

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, float64 `d d`; the difference of two large numbers is taken in extended precision."""
        coarse, mixed, fine = self.products.astype(np.longdouble)
        total = self.total.astype(np.longdouble).sum(0)
        squares = coarse + mixed + mixed.T + fine
        return ((squares - np.outer(total, total) / self.n) / (self.n - 1)).astype(np.float64)


def frechet_distance(one: Moments, two: Moments) -> float:
    """Squared Fréchet distance of the Gaussians with these moments.

    Raises:
        DataError: fewer than two rows on a side.
    """
    if min(one.n, two.n) < 2:
        raise DataError(f"{one.n} and {two.n} feature vectors; a covariance needs two at least")
    return gaussian_distance(one.mean, one.covariance, two.mean, two.covariance)


def gaussian_distance(mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other: np.ndarray) -> float:
    """The same of means `d` and covariances `d d`."""
    shift = float(np.square(mean - other_mean).sum())
    shared = np.linalg.svd(symmetric_root(cov) @ symmetric_root(other), compute_uv=False).sum()
    return max(0.0, shift + float(np.trace(cov) + np.trace(other) - 2 * shared))


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """Root of a symmetric positive semi-definite matrix; what is below its rounding counts as 0."""
    values, vectors = np.linalg.eigh(matrix)
    noise = max(float(values[-1]), 0.0) * len(values) * np.finfo(np.float64).eps
    return (vectors * np.sqrt(np.where(values > noise, values, 0.0))) @ vectors.T


def kernel_sum(x: np.ndarray, y: np.ndarray, *, same: bool) -> float:
    """Sum of k over all pairs of rows; `same`: the two are one set, and no row is paired with itself."""
    products = (x @ y.T / x.shape[1] + 1.0) ** 3
    return float(products.sum() - (np.trace(products) if same else 0.0))


class KernelSums:
    """Sums of the kernel between folds of both sides, of which any fold can be left out.

    Each side is given as the rows `n d` of its folds.
    """

    def __init__(self, real: Sequence[np.ndarray], sampled: Sequence[np.ndarray]) -> None:
        self.sizes = np.array([[len(part) for part in real], [len(part) for part in sampled]])
        self.within = [self._pairs(real, real, same=True), self._pairs(sampled, sampled, same=True)]
        self.across = self._pairs(real, sampled, same=False)

    @staticmethod
    def _pairs(one: Sequence[np.ndarray], two: Sequence[np.ndarray], *, same: bool) -> np.ndarray:
        return np.array(
            [[kernel_sum(x, y, same=same and i == j) for j, y in enumerate(two)] for i, x in enumerate(one)]
        )

    def distance(self, without: int | None = None) -> float:
        """MMD² of all rows, or of those of the other folds."""
        keep = [fold for fold in range(self.sizes.shape[1]) if fold != without]
        n = self.sizes[:, keep].sum(1).astype(float)
        parts = [sums[np.ix_(keep, keep)].sum() for sums in (*self.within, self.across)]
        return float(
            parts[0] / (n[0] * (n[0] - 1)) + parts[1] / (n[1] * (n[1] - 1)) - 2 * parts[2] / (n[0] * n[1])
        )
