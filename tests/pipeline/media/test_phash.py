"""The perceptual hash: stable under what a re-encode does, far apart for other pictures."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.media.phash import hamming, phash64


def picture(seed: int, height: int = 90, width: int = 160) -> np.ndarray:
    """A smooth random picture: what photographs look like to a low-frequency hash."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
    total = np.zeros((height, width, 3))
    for _ in range(24):
        fy, fx, phase = [*rng.normal(0, 3, 2).tolist(), rng.uniform(0, 6.3)]
        total += np.cos(6.3 * (fy * y + fx * x) + phase)[..., None] * rng.normal(0, 1, 3)
    return np.clip(128 + 30 * total, 0, 255).astype(np.uint8)


@given(st.integers(0, 10_000), st.integers(-20, 20), st.floats(0.85, 1.15))
def test_hash_hardly_moves_with_brightness_and_contrast(seed, shift, gain):
    original = picture(seed)
    changed = np.clip(original.astype(float) * gain + shift, 0, 255).astype(np.uint8)
    assert hamming(phash64(original), phash64(changed)) <= 8


def test_hash_hardly_moves_with_size():
    for seed in range(20):
        assert hamming(phash64(picture(seed)), phash64(picture(seed, 180, 320))) <= 4


def test_other_pictures_are_far_apart():
    hashes = [phash64(picture(seed)) for seed in range(40)]
    distances = [hamming(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 8
    assert 26 < np.mean(distances) < 36


def test_flat_pictures_hash_to_zero():
    assert {phash64(np.full((37, 53, 3), value, np.uint8)) for value in (0, 7, 128, 255)} == {0}


@given(st.integers(1, 70), st.integers(1, 70))
def test_any_size_hashes(height, width):
    assert 0 <= phash64(np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)) < 2**64
