"""What training and sampling ask of a diffusion process: EDM's (`model.edm`), or flow matching (`model.flow`).

A backbone says which one it was made for; the step, the sampler and the guidance work with either.
"""

from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """A process from clean videos x to noise by a level sigma, and what a network F learns of it."""

    @property
    def sigma_in(self) -> float:
        """Signal divisor: what the sampler ends on, times this, is on the scale of clean videos."""
        ...

    @property
    def sigma_max(self) -> float:
        """Level at which sampling starts: unit Gaussian noise times this."""
        ...

    @property
    def is_second_order(self) -> bool:
        """Sampled by Heun's method, two evaluations a step; else by Euler's."""
        ...

    def add_noise(self, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """Forward process: `b t c h w` noisy videos at `b` levels."""
        ...

    def c_in(self, sigma: Tensor) -> Tensor:
        """Scale of the network's input."""
        ...

    def denoised(self, f: Tensor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """D, the estimate of the clean video, affine in the network's answer."""
        ...

    def loss(self, f: Tensor, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """`b` float32 losses of the answer F."""
        ...

    def training_sigma(self, normal: Tensor) -> Tensor:
        """Noise levels of training, from unit Gaussian draws."""
        ...

    def sampling_sigmas(self, num_steps: int) -> Tensor:
        """`num_steps + 1` falling levels, the last one 0, float64."""
        ...

    def ode(self, x_sigma: Tensor, denoised: Tensor, sigma: Tensor | float) -> Tensor:
        """Slope of the path by sigma."""
        ...
