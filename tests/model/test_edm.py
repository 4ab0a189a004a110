"""The laws of the diffusion process, checked against closed forms of EDM and of a Gaussian."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.edm import Edm, edm_for, sigma_in

SIGMAS = st.floats(0.002, 80.0)
SCALES = st.floats(0.25, 64.0)
DATA = st.floats(0.3, 2.0)


def _sigma(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _video(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, 1, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    return pair[0], pair[1]


@settings(deadline=None, max_examples=40)
@given(SIGMAS, SCALES, DATA)
def test_exact_network_denoises_exactly(value: float, scale: float, data: float) -> None:
    edm, sigma, (x, eps) = Edm(sigma_in=scale, sigma_data=data), _sigma(value), _video()
    f = edm.c_nrm(sigma) * edm.v_target(x, eps, sigma)
    denoised = edm.denoised(f, edm.add_noise(x, eps, sigma), sigma)
    torch.testing.assert_close(denoised, x, rtol=1e-9, atol=1e-9 * max(1.0, scale))


@settings(deadline=None, max_examples=40)
@given(SIGMAS, DATA)
def test_sigma_in_one_is_edm(value: float, data: float) -> None:
    """Karras et al. table 1, written out anew: c_skip, c_out, c_in, lambda; F has the other sign."""
    edm, sigma = Edm(sigma_data=data), _sigma(value)
    total = math.sqrt(value**2 + data**2)
    assert edm.c_skip(sigma).item() == pytest.approx(data**2 / total**2)
    assert edm.c_out(sigma).item() == pytest.approx(-value * data / total)
    assert edm.c_in(sigma).item() == pytest.approx(1 / total)
    lambda_ = (value**2 + data**2) / (value * data) ** 2
    # EDM weights the error of D by lambda; the error of F is then weighted by lambda c_out^2 = 1.
    assert edm.weight(sigma).item() == pytest.approx(lambda_ * edm.c_out(sigma).item() ** 2)


@settings(deadline=None, max_examples=40)
@given(SIGMAS, DATA)
def test_edm_loss_equals_weighted_denoising_error(value: float, data: float) -> None:
    edm, sigma, (x, eps) = Edm(sigma_data=data), _sigma(value), _video(1)
    f = torch.full_like(x, 0.3)
    denoised = edm.denoised(f, edm.add_noise(x, eps, sigma), sigma)
    lambda_ = 1 / data**2 + 1 / value**2
    expected = lambda_ * (denoised - x).square().mean().item()
    assert edm.loss(f, x, eps, sigma).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 4.0, 32.0])
@pytest.mark.parametrize("value", [0.01, 0.5, 10.0])
def test_network_sees_and_predicts_unit_variance(scale: float, value: float) -> None:
    edm, sigma = Edm(sigma_in=scale), _sigma(value)
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 1, 200_000, generator=generator, dtype=torch.float64)
    seen = edm.c_in(sigma) * edm.add_noise(x, eps, sigma)
    target = edm.c_nrm(sigma) * edm.v_target(x, eps, sigma)
    assert seen.std().item() == pytest.approx(1, abs=0.01)
    assert target.std().item() == pytest.approx(1, abs=0.01)


def test_weight_tends_to_sigma_in_squared_at_low_noise() -> None:
    assert Edm(sigma_in=32).weight(_sigma(1e-6)).item() == pytest.approx(1024, rel=1e-6)


def test_sigma_in_reproduces_both_published_values() -> None:
    assert sigma_in(16, 36, 64) == 4
    assert sigma_in(16, 288, 512) == 32
    assert edm_for(1, 36, 64).sigma_in == 1


def test_schedule_falls_from_sigma_max_to_zero() -> None:
    sigmas = Edm().sampling_sigmas(18)
    assert sigmas.shape == (19,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[-2].item() == pytest.approx(0.002)
    assert sigmas[-1].item() == 0
    # EDM equation 5 at i = 1 of N = 18, rho = 7
    root = 80 ** (1 / 7) + 1 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    assert sigmas[1].item() == pytest.approx(root**7)


def test_schedule_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        Edm().sampling_sigmas(0)


def test_training_noise_is_log_normal() -> None:
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    logs = Edm().training_sigma(normal).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert logs.std().item() == pytest.approx(1.2, abs=0.02)
