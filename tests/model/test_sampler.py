"""The sampler on distributions whose score is known, and the cascade on a real (tiny) network."""

from dataclasses import replace

import pytest
import torch

from model.edm import Edm, edm_for
from model.guidance import FULL, NOTHING, Guidance
from model.sample import Denoiser, sample_ode, upsample
from model.step import has_latents

MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
MIX = torch.tensor([[0.8, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.4]], dtype=torch.float64)
COVARIANCE = MIX @ MIX.T


def _gaussian_denoiser(edm: Edm):
    """E[x | x_sigma] for x ~ N(MEAN, COVARIANCE), x_sigma = x / sigma_in + sigma eps."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor, _: int) -> torch.Tensor:
        scaled = COVARIANCE / edm.sigma_in**2
        gain = torch.linalg.solve(scaled + sigma**2 * torch.eye(3, dtype=x.dtype), scaled).T
        return ((x - MEAN / edm.sigma_in) @ gain.T + MEAN / edm.sigma_in) * edm.sigma_in

    return denoise


def _noise(count: int) -> torch.Tensor:
    """Gaussian noise whose sample mean and covariance are exactly 0 and 1."""
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / count)).T


@pytest.mark.parametrize("sigma_in", [1.0, 4.0, 32.0])
def test_sampled_gaussian_has_the_right_mean_and_covariance(sigma_in: float) -> None:
    edm = Edm(sigma_in=sigma_in)
    got = sample_ode(_gaussian_denoiser(edm), edm, _noise(5_000), num_steps=96)
    assert (got.mean(0) - MEAN).abs().max() < 0.01 * MEAN.abs().max()
    error = torch.linalg.matrix_norm(got.T.cov() - COVARIANCE)
    assert error < 0.01 * torch.linalg.matrix_norm(COVARIANCE)


def test_error_falls_with_the_square_of_the_step() -> None:
    """Against the exact flow of a Gaussian, down to sigma_min (the last step to 0 is Euler's)."""
    edm, noise, errors = Edm(sigma_in=2.0), _noise(64), []
    for num_steps in (32, 64, 128):
        reached: list[torch.Tensor] = []
        denoise = _gaussian_denoiser(edm)

        def record(x, sigma, step, denoise=denoise, reached=reached, last=num_steps - 1):
            if step == last:
                reached.append(x)
            return denoise(x, sigma, step)

        sample_ode(record, edm, noise, num_steps=num_steps)
        errors.append((reached[0] - _exact_flow(edm, noise)).norm().item())
    orders = torch.tensor(errors).log2().diff().neg()
    assert ((orders > 1.8) & (orders < 2.4)).all(), orders


def _exact_flow(edm: Edm, noise: torch.Tensor) -> torch.Tensor:
    """Each principal axis shrinks by sqrt((l + smin^2) / (l + smax^2)) about the mean."""
    values, axes = torch.linalg.eigh(COVARIANCE / edm.sigma_in**2)
    shrink = ((values + edm.sigma_min**2) / (values + edm.sigma_max**2)).sqrt()
    mean = MEAN / edm.sigma_in
    return ((noise * edm.sigma_max - mean) @ axes * shrink) @ axes.T + mean


def test_second_order_costs_one_evaluation_less_than_two_a_step() -> None:
    calls: list[int] = []
    edm = Edm()
    denoise = _gaussian_denoiser(edm)
    sample_ode(lambda *a: (calls.append(1), denoise(*a))[1], edm, _noise(8), num_steps=10)
    assert len(calls) == 19


@pytest.fixture
def setting(make_generator, make_condition, tiny_fit):
    return make_generator(tiny_fit), edm_for(4, 12, 16), make_condition()


def _video_noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sampling_is_deterministic(setting) -> None:
    model, edm, condition = setting
    noise = _video_noise(0, 2, 4, 3, 12, 16)
    a, b = (sample_ode(Denoiser(model, edm, {FULL: condition}), edm, noise, num_steps=4) for _ in range(2))
    assert torch.equal(a, b)
    assert a.isfinite().all()


def test_guided_branches_equal_separate_evaluations(setting) -> None:
    model, edm, condition = setting
    nothing = replace(condition, mask=torch.zeros_like(condition.mask))
    both = Denoiser(model, edm, {FULL: condition, NOTHING: nothing}, Guidance("cfg", weight=3.0))
    x, sigma = _video_noise(1, 2, 4, 3, 12, 16), torch.tensor(0.8)
    with torch.no_grad():
        full = Denoiser(model, edm, {FULL: condition})(x, sigma, 0)
        none = Denoiser(model, edm, {FULL: nothing})(x, sigma, 0)
        got = both(x, sigma, 0)
    torch.testing.assert_close(got, none + 3 * (full - none), rtol=1e-4, atol=1e-4)


def test_latents_are_carried_from_step_to_step(setting) -> None:
    model, edm, condition = setting
    denoiser = Denoiser(model, edm, {FULL: condition})
    assert has_latents(model)
    x, sigma = _video_noise(1, 2, 4, 3, 12, 16), torch.tensor(0.8)
    with torch.no_grad():
        first, second = denoiser(x, sigma, 0), denoiser(x, sigma, 1)
    assert not torch.allclose(first, second)


def test_missing_branch_is_refused(setting) -> None:
    model, edm, condition = setting
    with pytest.raises(ValueError, match="phantom"):
        Denoiser(model, edm, {FULL: condition}, Guidance("phantom"))


def test_cascade_enlarges_and_reads_the_small_video(make_generator, make_condition, tiny_fit) -> None:
    up = make_generator(replace(tiny_fit, in_channels=6))
    edm, condition = edm_for(4, 12, 16), make_condition()
    noise, small_noise = _video_noise(0, 2, 4, 3, 12, 16), _video_noise(1, 2, 4, 3, 12, 16)

    def run(small: torch.Tensor) -> torch.Tensor:
        denoiser = Denoiser(up, edm, {FULL: condition})
        return upsample(denoiser, small, noise, small_noise, level=0.1, num_steps=3)

    small = _video_noise(2, 2, 4, 3, 6, 8).clamp(-1, 1)
    assert run(small).shape == noise.shape
    assert not torch.allclose(run(small), run(-small))
