"""Averages of the weights: against their definitions, and reconstructed after the fact."""

# pyright: reportPrivateImportUsage=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.ema import Ema, HalfLife, PowerFunction, Snapshot, gamma_of, mixing_weights, reconstruct
from tests.model.small_model import small_model


def test_half_life_halves() -> None:
    model = small_model()
    ema = Ema(model, HalfLife(half_life=100))
    start = {k: v.clone() for k, v in ema.weights.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for samples in (30, 60, 100):
        ema.update(model, samples)
    for name, weight in ema.weights.items():
        torch.testing.assert_close(weight, start[name] / 2)


def test_average_does_not_depend_on_the_batch_size() -> None:
    """Constant weights between updates: one step of 64 samples equals 64 steps of one."""
    for profile in (HalfLife(50), PowerFunction(0.1)):
        kept = math.prod(profile.keep(100 + i, 101 + i) for i in range(64))
        assert kept == pytest.approx(profile.keep(100, 164))


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 0.28))
def test_power_profile_has_the_asked_width(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = tau**gamma
    density /= density.sum()
    mean = (density * tau).sum()
    assert ((density * (tau - mean) ** 2).sum().sqrt()).item() == pytest.approx(sigma_rel, rel=1e-3)


def test_gamma_is_the_published_one() -> None:
    """EDM2: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)
    with pytest.raises(ValueError, match="legal"):
        gamma_of(0.5)


def test_power_average_forgets_its_start_and_weighs_the_past_by_its_profile() -> None:
    model, ema = nn.Linear(1, 1, bias=False), None
    ema = Ema(model, PowerFunction(0.1))
    n = 2000
    for i in range(1, n + 1):
        with torch.no_grad():
            model.weight.fill_(i / n)
        ema.update(model, i)
    gamma = gamma_of(0.1)
    assert ema.weights["weight"].item() == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)


def test_reconstructed_average_equals_the_directly_tracked_one() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16, bias=False)
    stored, direct = [Ema(model, PowerFunction(s)) for s in (0.05, 0.10)], Ema(model, PowerFunction(0.15))
    snapshots, batch = [], 4
    target = torch.randn(16, 16)
    for step in range(1, 1025):
        with torch.no_grad():
            model.weight.lerp_(target, 0.003).add_(torch.randn(16, 16) * 0.002)
        for ema in (*stored, direct):
            ema.update(model, step * batch)
        if step % 64 == 0:
            for ema in stored:
                kept = {k: v.clone() for k, v in ema.weights.items()}
                snapshots.append((Snapshot(step * batch, ema.profile.sigma_rel), kept))
    got = reconstruct(snapshots, 4096, 0.15)["weight"]
    want = direct.weights["weight"]
    assert ((got - want).norm() / want.norm()).item() < 1e-3


def test_stored_profile_reconstructs_itself() -> None:
    snapshots = [Snapshot(t, s) for t in (256, 512, 1024) for s in (0.05, 0.1)]
    weights = mixing_weights(snapshots, 1024, 0.1)
    expected = torch.tensor([0, 0, 0, 0, 0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
