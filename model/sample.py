"""Samplers: EDM's deterministic second-order (Heun) or flow matching's Euler, with guidance and the cascade.

Nothing here knows prompts or files. `sample_ode` takes any closure that denoises; `Denoiser` makes
one of a generator, its conditions and a guidance; `upsample` runs the second stage of the cascade.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.condition import Condition, concat_conditions
from model.generator import Generator, SmallVideo
from model.guidance import Branch, Guidance
from model.objective import Objective
from model.step import autocast, enlarge_small, has_latents, network_input, with_first_frame

Denoise = Callable[[Tensor, Tensor, int], Tensor]
"""`(x_sigma: b t c h w, sigma: scalar, step) -> denoised: b t c h w` on the scale of clean videos."""


@torch.no_grad()
def sample_ode(
    denoise: Denoise,
    objective: Objective,
    noise: Tensor,
    *,
    num_steps: int,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """The process's deterministic sampler: EDM's (Heun; 2206.00364 algorithm 1), or Euler's for flow matching.

    Args:
        denoise: the estimate of the clean video.
        objective: the process; its schedule is used.
        noise: `b t c h w` unit Gaussian.
        num_steps: Snap Video takes 256 for the base and 40 for the upsampler; `2 num_steps - 1`
            evaluations with EDM, `num_steps` with flow matching.
        on_step: called after each step with its number.

    Returns:
        `b t c h w` videos on the scale of clean videos.
    """
    sigmas = objective.sampling_sigmas(num_steps).to(noise.device)
    sigmas = sigmas.to(noise.dtype) if noise.device.type == "mps" else sigmas
    x = noise * objective.sigma_max
    for step in range(num_steps):
        now, then = sigmas[step], sigmas[step + 1]
        slope = objective.ode(x, denoise(x, now, step), now)
        ahead = x + ((then - now) * slope).to(x.dtype)
        if objective.is_second_order and step < num_steps - 1:  # at sigma = 0 the slope has no value
            slope_ahead = objective.ode(ahead, denoise(ahead, then, step), then)
            ahead = x + ((then - now) * (slope + slope_ahead) / 2).to(x.dtype)
        x = ahead
        if on_step is not None:
            on_step(step)
    return x * objective.sigma_in


@dataclass
class Denoiser:
    """A generator with its prompts and guidance, as a `Denoise`; the latents are carried along.

    Attributes:
        model: the generator.
        objective: its process.
        conditions: one batch of conditions per branch of the guidance.
        guidance: how the branches are combined.
        dtype: autocast to this; None computes in the parameters' type.
        small: the upsampler's small video.
        first: `b c h w` clean first frames, given to the branches whose condition says so.
    """

    model: Generator
    objective: Objective
    conditions: Mapping[Branch, Condition]
    guidance: Guidance = field(default_factory=lambda: Guidance("none"))
    dtype: torch.dtype | None = None
    small: SmallVideo | None = None
    first: Tensor | None = None
    _z: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        missing = [set(b) for b in self.guidance.branches if b not in self.conditions]
        if missing:
            raise ValueError(f"guidance {self.guidance.scheme!r} needs conditions without {missing}")
        self._stacked = concat_conditions([self.conditions[b] for b in self.guidance.branches])

    def __call__(self, x_sigma: Tensor, sigma: Tensor, step: int) -> Tensor:
        """All branches in one evaluation; its latents are the next one's self-conditioning."""
        count = len(self.guidance.branches)
        sigmas = sigma.to(x_sigma.dtype).expand(len(x_sigma) * count)
        x = x_sigma.repeat(count, 1, 1, 1, 1)
        scaled = network_input(self.objective, x, sigmas)
        given = self._stacked.has_first_frame
        if self.first is not None and given is not None:
            scaled = with_first_frame(self.objective, scaled, self.first.repeat(count, 1, 1, 1), given)
        with autocast(x.device, self.dtype):
            f, z = self.model(scaled, sigmas, self._stacked, self._z, small=_repeat(self.small, count))
        self._z = z if has_latents(self.model) else None
        denoised = self.objective.denoised(f.to(x.dtype), x, sigmas).chunk(count)
        estimates = dict(zip(self.guidance.branches, denoised, strict=True))
        guided = self.guidance.combine(estimates, step)
        if self.first is None or given is None:
            return guided
        # Frame 0 is known: the path ends on it, whatever the branches without it guess.
        known = given.view(count, -1).any(dim=0).view(-1, 1, 1, 1)
        first = torch.where(known, self.first.to(guided.dtype), guided[:, 0])
        return torch.cat([first[:, None], guided[:, 1:]], dim=1)


def _repeat(small: SmallVideo | None, count: int) -> SmallVideo | None:
    if small is None:
        return None
    return SmallVideo(small.video.repeat(count, 1, 1, 1, 1), small.level.repeat(count))


def upsample(
    denoiser: Denoiser,
    small: Tensor,
    noise: Tensor,
    small_noise: Tensor,
    *,
    level: float,
    num_steps: int = 40,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Second stage of the cascade: the small video, noised a little, conditions the large one.

    Args:
        denoiser: an upsampler's; its `small` is set here.
        small: `b t c h w` in [-1, 1], from the base model.
        noise: `b t c H W` unit Gaussian the large video starts from.
        small_noise: `b t c H W` unit Gaussian that blurs what the base model got wrong.
        level: of the small video's noise; Snap Video searches it at inference.
        num_steps: 40 in Snap Video.
        on_step: called after each step with its number.
    """
    levels = torch.full((len(small),), level, device=small.device, dtype=small.dtype)
    size = tuple(noise.shape[-2:])
    denoiser.small = enlarge_small(small, size, SmallVideo(small_noise, levels))
    return sample_ode(denoiser, denoiser.objective, noise, num_steps=num_steps, on_step=on_step)
