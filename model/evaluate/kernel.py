"""Kernel distance of two sets of features (KID, KVD): unbiased, so that its mean doesn't depend on n.

    MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y),   k(x, y) = (x·y / d + 1)³      Binkowski et al., 1801.01401

All pairs are taken, in place of the usual hundred random subsets, whose mean has the same expectation.
"""

from collections.abc import Sequence

import numpy as np


def kernel_sum(x: np.ndarray, y: np.ndarray, *, same: bool) -> float:
    """Sum of k over all pairs of rows; `same`: the two are one set, and no row is paired with itself."""
    products = (x @ y.T / x.shape[1] + 1.0) ** 3
    return float(products.sum() - (np.trace(products) if same else 0.0))


class KernelSums:
    """Sums of the kernel between folds of both sides, of which any fold can be left out.

    Args:
        real: rows `n d` of each fold.
        sampled: likewise.
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
