"""Flow matching: laws of its equations, a velocity field that is known, and diffusers' own schedule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.flow import Flow, clean, interpolate, logit_normal, shifted, velocity
from model.sample import sample_ode

TIMES = st.floats(1e-3, 1.0)
SHIFTS = st.floats(0.1, 20.0)
MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
MIX = torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.4]], dtype=torch.float64)
COVARIANCE = MIX @ MIX.T


def _pair(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, 1, 2, 2, generator=g), torch.randn(count, 2, 1, 2, 2, generator=g)


@given(t=TIMES, shift=SHIFTS)
def test_the_clean_video_comes_back_from_the_noisy_one_and_its_velocity(t: float, shift: float) -> None:
    (x, eps), flow = _pair(8), Flow(shift=shift)
    times = torch.full((8,), t)
    x_t = flow.add_noise(x, eps, times)
    assert torch.allclose(flow.denoised(velocity(x, eps), x_t, times), x, atol=1e-5)
    assert torch.allclose(flow.ode(x_t, x, t), velocity(x, eps), atol=1e-5 / t)


@given(t=TIMES)
def test_variances_are_those_of_a_straight_path(t: float) -> None:
    """Unit at both ends, (1-t)^2 + t^2 between; the velocity's is 2 everywhere."""
    x, eps = _pair()
    time = torch.tensor(t)
    assert float(interpolate(x, eps, time).var()) == pytest.approx((1 - t) ** 2 + t**2, rel=0.05)
    assert float(velocity(x, eps).var()) == pytest.approx(2, rel=0.05)
    assert torch.equal(clean(velocity(x, eps), interpolate(x, eps, torch.tensor(0.0)), torch.tensor(0.0)), x)


@given(t=st.floats(1e-3, 0.99), first=SHIFTS, second=SHIFTS)
def test_shifts_multiply_the_odds_of_the_time(t: float, first: float, second: float) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    once = shifted(time, first)
    assert float(once / (1 - once)) == pytest.approx(first * t / (1 - t), rel=1e-6)
    assert float(shifted(once, second)) == pytest.approx(float(shifted(time, first * second)))


def test_times_of_training_are_logit_normal_and_shifted() -> None:
    """Half of them lie below the shifted middle, and sigma by sigma as the normal's do."""
    normal, flow = torch.randn(20_000, generator=torch.Generator().manual_seed(0)), Flow(shift=3, std=2)
    times = flow.training_sigma(normal)
    assert times.min() > 0 and times.max() < 1
    for sigmas in (-1.0, 0.0, 1.0):
        at = flow.training_sigma(torch.tensor(sigmas))
        share = (times <= at).float().mean()
        assert float(share) == pytest.approx(torch.special.ndtr(torch.tensor(sigmas)).item(), abs=0.01)
    assert float(flow.training_sigma(torch.tensor(0.0))) == pytest.approx(0.75)
    assert float(logit_normal(torch.tensor(0.0))) == 0.5


def _gaussian_denoiser(x: torch.Tensor, t: torch.Tensor, _: int) -> torch.Tensor:
    """E[x | x_t] for x ~ N(MEAN, COVARIANCE)."""
    noisy = (1 - t) ** 2 * COVARIANCE + t**2 * torch.eye(3, dtype=x.dtype)
    gain = torch.linalg.solve(noisy, (1 - t) * COVARIANCE).T
    return (x - (1 - t) * MEAN) @ gain.T + MEAN


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_known_velocity_field_carries_noise_to_its_gaussian(shift: float) -> None:
    x = torch.randn(5_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky((x - x.mean(0)).T.cov(correction=0))).T
    got = sample_ode(_gaussian_denoiser, Flow(shift=shift), x, num_steps=400)
    assert (got.mean(0) - MEAN).abs().max() < 0.02 * MEAN.abs().max()
    error = torch.linalg.matrix_norm(got.T.cov() - COVARIANCE)
    assert error < 0.02 * torch.linalg.matrix_norm(COVARIANCE)


def test_euler_costs_one_evaluation_a_step() -> None:
    calls: list[int] = []
    noise = torch.zeros(2, 3, dtype=torch.float64)
    sample_ode(lambda *a: (calls.append(1), _gaussian_denoiser(*a))[1], Flow(), noise, num_steps=10)
    assert len(calls) == 10


@pytest.mark.parametrize(("num_steps", "shift"), [(1, 1.0), (7, 3.0), (50, 5.0)])
def test_the_schedule_is_that_of_diffusers(num_steps: int, shift: float) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(num_steps)
    ours = Flow(shift=shift).sampling_sigmas(num_steps)
    assert torch.allclose(ours.float(), torch.as_tensor(theirs.sigmas), atol=2e-6)
    with pytest.raises(ValueError, match="num_steps is 0"):
        Flow().sampling_sigmas(0)


def test_the_loss_is_the_squared_distance_to_the_velocity_of_each_sample_alone() -> None:
    x, eps = _pair(3)
    losses = Flow().loss(
        velocity(x, eps) + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1, 1), x, eps, torch.rand(3)
    )
    assert torch.allclose(losses, torch.tensor([0.0, 1.0, 4.0]), atol=1e-5)
