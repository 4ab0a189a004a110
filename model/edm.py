"""EDM diffusion as Snap Video changes it (signal scaled by 1 / sigma_in), one equation per function.

Averaging a block of T frames of s x s pixels cuts the variance of the noise by T s^2, so a large
video leaks its signal through the noise. Dividing the signal by sigma_in = s sqrt(T) restores the
signal-to-noise ratio that EDM was tuned for (Snap Video, 2402.14797, section 3.1).

    x         clean video, unit variance assumed (sigma_data)     eps     unit Gaussian
    x_sigma   noisy video                                         F       what the network returns

At sigma_in = 1 this is EDM (Karras et al., 2206.00364) with the sign of F turned around. Signs are
those of Snap Video's appendix E; the target printed in its table 1 has the opposite one, which does
not fit the c_out of the same table.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edm:
    """The constants of one diffusion process, and its equations.

    Attributes:
        sigma_in: signal divisor; 4 for 16 frames of 64 x 36 pixels, 32 for 512 x 288 (section 3.1).
        sigma_data: assumed standard deviation of the data; 1 makes the target v (section 3.1).
        log_mean, log_std: of ln sigma in training; EDM table 1, "unaltered" in Snap Video.
        sigma_min, sigma_max, rho: of the sampling schedule; EDM table 1.
    """

    sigma_in: float = 1.0
    sigma_data: float = 1.0
    log_mean: float = -1.2
    log_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def is_second_order(self) -> bool:
        """Sampled by Heun's method (EDM algorithm 1)."""
        return True

    def add_noise(self, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """Forward process, x_sigma = x / sigma_in + sigma eps (table 1)."""
        return x / self.sigma_in + _like(sigma, x) * eps

    def v_target(self, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """V = sigma_data^2 eps - sigma x (appendix E, equation 15)."""
        return self.sigma_data**2 * eps - _like(sigma, x) * x

    def c_in(self, sigma: Tensor) -> Tensor:
        """Scale that gives the network an input of unit variance (table 1)."""
        return (self.sigma_data**2 / self.sigma_in**2 + sigma**2).rsqrt()

    def c_nrm(self, sigma: Tensor) -> Tensor:
        """Scale that gives the network a target of unit variance (table 1)."""
        return (sigma**2 + self.sigma_data**2).rsqrt() / self.sigma_data

    def c_skip(self, sigma: Tensor) -> Tensor:
        """Share of the noisy input in the estimate of the clean video (table 1)."""
        data = self.sigma_data**2
        return self.sigma_in * data / (self.sigma_in * sigma**2 + data)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Share of the network's answer in the estimate of the clean video (table 1)."""
        data = self.sigma_data**2
        scale = self.sigma_in * sigma * self.sigma_data * (sigma**2 + data).sqrt()
        return -scale / (data + self.sigma_in * sigma**2)

    def weight(self, sigma: Tensor) -> Tensor:
        """Loss weight w(sigma) of the network's answer (table 1).

        It is lambda(sigma) c_out^2 with EDM's lambda = 1/sigma_data^2 + 1/sigma^2 for every sigma_in,
        and tends to sigma_in^2 as sigma tends to 0.
        """
        data = self.sigma_data**2
        return ((sigma**2 + data) / (sigma**2 + data / self.sigma_in)) ** 2

    def denoised(self, f: Tensor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """D = c_out F + c_skip x_sigma, the estimate of the clean video (table 1)."""
        return _like(self.c_out(sigma), f) * f + _like(self.c_skip(sigma), f) * x_sigma

    def loss(self, f: Tensor, x: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
        """`b` losses w(sigma) mean |F - c_nrm v|^2, in float32 (section 3.1)."""
        target = _like(self.c_nrm(sigma), x) * self.v_target(x, eps, sigma)
        error = (f.float() - target).square().flatten(1).mean(dim=1)
        return self.weight(sigma) * error

    def training_sigma(self, normal: Tensor) -> Tensor:
        """Ln sigma ~ N(log_mean, log_std^2), from unit Gaussian draws (EDM table 1)."""
        return (normal * self.log_std + self.log_mean).exp()

    def sampling_sigmas(self, num_steps: int) -> Tensor:
        """`num_steps + 1` falling noise levels, the last one 0 (EDM equation 5), float64.

        Raises:
            ValueError: fewer than one step.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, at least 1 is needed")
        ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return torch.cat([(high + ramp * (low - high)) ** self.rho, torch.zeros(1)])

    def ode(self, x_sigma: Tensor, denoised: Tensor, sigma: Tensor | float) -> Tensor:
        """dx/dsigma = (x_sigma - D / sigma_in) / sigma (EDM equation 3, D scaled to the input)."""
        return (x_sigma - denoised / self.sigma_in) / sigma


def sigma_in(num_frames: int, height_px: int, width_px: int) -> float:
    """sigma_in = s sqrt(T), s = longer side over EDM's 64 pixels (section 3.1).

    4 for 16 x 36 x 64 and 32 for 16 x 288 x 512, the two values of the paper. Latents count as pixels: what
    sigma_in makes up for is what neighbours share, and neighbouring latents share far less than pixels do.
    """
    return max(height_px, width_px) / 64 * math.sqrt(num_frames)


def edm_for(num_frames: int, height_px: int, width_px: int) -> Edm:
    """The process for videos of this size; a lone picture has `num_frames` 1 unless repeated."""
    return Edm(sigma_in=sigma_in(num_frames, height_px, width_px))


def _like(scalar: Tensor, x: Tensor) -> Tensor:
    """`b` to `b 1 1 1 1`, so that it multiplies a batch of videos."""
    return scalar.reshape(-1, *([1] * (x.ndim - 1))).to(x.dtype)
