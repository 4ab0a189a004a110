"""Flow matching (rectified flow) as Wan and LTX are trained: straight paths from data to noise, Euler steps.

    x    clean video, about unit variance     eps  unit Gaussian
    t    time in [0, 1], 0 = data             v    what the network returns

Equations are those of Stable Diffusion 3 (Esser et al., 2403.03206), which these models follow.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_STEPS = 1000
"""Networks of diffusers are told 1000 t, and schedules end a thousandth before the data."""


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Forward process, x_t = (1 - t) x + t eps (equation 13)."""
    return (1 - t) * x + t * eps


def velocity(x: Tensor, eps: Tensor) -> Tensor:
    """V = d x_t / dt = eps - x."""
    return eps - x


def clean(v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """D = x_t - t v, the estimate of the clean video."""
    return x_t - t * v


def logit_normal(normal: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """T = sigmoid(mean + std normal), from unit Gaussian draws (equation 19)."""
    return torch.sigmoid(mean + std * normal)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times moved towards the noise, t' = s t / (1 + (s - 1) t) (equation 23); the ends stay."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class Flow:
    """The constants of one process, as an `Objective`; its noise level sigma is the time t.

    Attributes:
        shift: of the times, in training and in sampling; 1 = none. Wan's pipelines take 3 for 480p and 5
            for 720p.
        mean, std: of the logit of t in training, before the shift; 0 and 1 (Stable Diffusion 3).
    """

    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    @property
    def sigma_in(self) -> float:
        return 1.0

    @property
    def sigma_max(self) -> float:
        return 1.0

    @property
    def is_second_order(self) -> bool:
        return False

    def add_noise(self, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        return interpolate(x, eps, _like(sigma, x))

    def c_in(self, sigma: Tensor) -> Tensor:
        """The network takes x_t as it is."""
        return torch.ones_like(sigma)

    def denoised(self, f: Tensor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        return clean(f, x_sigma, _like(sigma, f))

    def loss(self, f: Tensor, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """`b` losses mean |F - v|^2, in float32, the same at every time."""
        return (f.float() - velocity(x, eps).float()).square().flatten(1).mean(dim=1)

    def training_sigma(self, normal: Tensor) -> Tensor:
        return shifted(logit_normal(normal, mean=self.mean, std=self.std), self.shift)

    def sampling_sigmas(self, num_steps: int) -> Tensor:
        """`num_steps + 1` falling times from 1 to 0, float64: those of diffusers' FlowMatchEuler scheduler.

        Raises:
            ValueError: fewer than one step.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, at least 1 is needed")
        last = float(shifted(torch.tensor(1 / TRAIN_STEPS, dtype=torch.float64), self.shift))
        even = torch.linspace(1, last, num_steps, dtype=torch.float64)
        return torch.cat([shifted(even, self.shift), torch.zeros(1)])

    def ode(self, x_sigma: Tensor, denoised: Tensor, sigma: Tensor | float) -> Tensor:
        """dx/dt = (x_t - D) / t, which is v."""
        return (x_sigma - denoised) / sigma


def _like(scalar: Tensor, x: Tensor) -> Tensor:
    """`b` to `b 1 1 1 1`, so that it multiplies a batch of videos."""
    return scalar.reshape(-1, *([1] * (x.ndim - 1))).to(x.dtype)
