"""Laws of the Fréchet distance: goldens of other implementations, exact sums, what n does."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import DataError
from model.evaluate.distances import FINE, Moments, frechet_distance, symmetric_root


def moments(x: np.ndarray) -> Moments:
    found = Moments(x.shape[1])
    found.add(x)
    return found


def kept_rows(n: int, d: int, salt: int) -> np.ndarray:
    """The inputs of the goldens: whole numbers modulo a prime, so that anybody can make them again."""
    i, j = np.arange(n)[:, None], np.arange(d)[None]
    whole = ((i + 1) * 7919 * (j + 3) + (i * i + salt) * 104729 + j * j * 31 * (salt + 1)) % 1009
    return whole / 1009 * (1 + j / 4) + salt * (j % 3) / 8


@pytest.mark.parametrize(
    ("one", "two", "golden"),
    [
        ((40, 6, 1), (50, 6, 2), 0.21667104301660574567),
        ((4, 6, 1), (50, 6, 2), 0.84427256916470280685),  # a covariance of rank 3
        ((4, 6, 1), (5, 6, 3), 1.7340643842322745427),
    ],
)
def test_golden_with_covariance_by_mpmath_at_40_digits(one, two, golden: float) -> None:
    found = frechet_distance(moments(kept_rows(*one)), moments(kept_rows(*two)))
    assert found == pytest.approx(golden, rel=1e-6)


def scipy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """As pytorch-fid and the ports of FVD compute it."""
    one, two = (np.cov(part, rowvar=False) for part in (x, y))
    shared = np.trace(scipy.linalg.sqrtm(one @ two).real)  # pyright: ignore[reportAttributeAccessIssue]
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(one) + np.trace(two) - 2 * shared)


def test_agrees_with_scipy_and_falls_with_n() -> None:
    draw = np.random.default_rng(0)
    mixed = draw.normal(size=(100, 100)) / 10
    found = []
    for n in (150, 400, 1600):
        x, y = draw.normal(size=(n, 100)) @ mixed, draw.normal(size=(n, 100)) @ mixed
        found.append(frechet_distance(moments(x), moments(y)))
        assert found[-1] == pytest.approx(scipy_distance(x, y), rel=1e-6)
    assert found[0] > 2 * found[1] > 4 * found[2]  # the same Gaussian on both sides


@pytest.mark.parametrize("n", [30, 500])
def test_a_set_is_at_no_distance_from_itself(n: int) -> None:
    x = np.random.default_rng(0).normal(size=(n, 100)) * np.linspace(0.01, 5, 100)
    assert frechet_distance(moments(x), moments(x)) < 1e-9 * np.trace(moments(x).covariance)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 100.0]), cuts=st.integers(1, 6))
def test_any_order_and_any_workers_give_the_same_bits(seed: int, scale: float, cuts: int) -> None:
    draw = np.random.default_rng(seed)
    x = (draw.normal(size=(41, 5)) * scale).astype(np.float32)
    whole, merged = moments(x), Moments(5)
    for part in np.array_split(x[draw.permutation(len(x))], cuts):
        merged.merge(moments(part))
    assert np.array_equal(whole.mean, merged.mean) and np.array_equal(whole.covariance, merged.covariance)
    rest = whole.without(moments(x[:7]))
    assert rest.n == 34 and np.array_equal(rest.covariance, moments(x[7:]).covariance)


def test_moments_are_those_of_the_rows() -> None:
    x = np.random.default_rng(1).normal(size=(60, 7)) * 20 + 100
    found = moments(x)
    assert np.abs(found.mean - x.mean(0)).max() < 1 / FINE
    assert found.covariance == pytest.approx(np.cov(x, rowvar=False), rel=1e-6)


def test_what_is_no_feature_is_refused() -> None:
    for bad in (np.nan, np.inf, 2000.0):
        with pytest.raises(DataError, match="finite"):
            moments(np.full((3, 2), bad))
    with pytest.raises(DataError, match="1 and 2 feature vectors"):
        frechet_distance(moments(np.ones((1, 2))), moments(np.ones((2, 2))))


def test_roots_of_low_rank_are_real() -> None:
    x = np.random.default_rng(0).normal(size=(5, 40))
    covariance = np.cov(x, rowvar=False)
    root = symmetric_root(covariance)
    assert np.isfinite(root).all() and root @ root == pytest.approx(covariance, abs=1e-10)


@pytest.mark.parametrize("power", [0.0, 0.5], ids=["white", "falling"])
def test_few_videos_are_far_apart_for_their_number_alone(power: float) -> None:
    """What `SMALL_N` and docs/evaluate.md say, of two sets of one Gaussian, white or of a falling spectrum."""
    draw, scale = np.random.default_rng(0), np.arange(1, 401) ** -power

    def distance(n: int) -> float:
        return frechet_distance(*(moments(draw.normal(size=(n, 400)) * scale) for _ in range(2)))

    few, some, many = distance(30), distance(256), distance(2048)
    assert 2 < few / some < 3.5 and 7 < some / many < 8.5
