"""Exponential moving averages of the weights: by half-life (Snap Video), and by power function (EDM2).

    HalfLife       weights = 0.5^(samples / half_life) weights + ...; 6,000 steps in Snap Video
    PowerFunction  the average over the past t with density ~ tau^gamma; its width is a share
                   `sigma_rel` of the training so far (Karras et al. 2312.02696, section 3.1)
    reconstruct    any other width, after training, from stored snapshots (section 3.2)

Averages are kept as the parameters are: sharded where those are (`DTensor`), on the same device.
"""

# pyright: reportPrivateImportUsage=false

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.optim import local_shard


@dataclass(frozen=True)
class HalfLife:
    """Exponential average.

    Attributes:
        half_life: samples after which a weight counts half; Snap Video: 6,000 steps of 4,096.
    """

    half_life: float

    def keep(self, before: int, after: int) -> float:
        """Share of the old average that stays when progress goes from `before` to `after` samples."""
        return 0.5 ** ((after - before) / self.half_life)


@dataclass(frozen=True)
class PowerFunction:
    """Power-function average; equal at any batch size, because progress is counted in samples.

    Attributes:
        sigma_rel: standard deviation of the profile as a share of the training so far; EDM2 stores
            0.05 and 0.10.
    """

    sigma_rel: float

    @property
    def gamma(self) -> float:
        return gamma_of(self.sigma_rel)

    def keep(self, before: int, after: int) -> float:
        """Beta = (before / after)^(gamma + 1) (EDM2 equation 127); 0 at the start."""
        return (before / after) ** (self.gamma + 1)


Profile = HalfLife | PowerFunction


def make_profile(name: str, *, longest: int | None = None) -> Profile:
    """The profile that a name asks for: `half-life-<samples>` or `power-<sigma_rel>`.

    `longest` caps a half-life, samples.

    Raises:
        ValueError: another name, or a width outside (0, 0.288).
    """
    kind, _, number = name.rpartition("-")
    try:
        if kind == "half-life" and int(number) > 0:
            return HalfLife(min(int(number), longest or int(number)))
        if kind == "power" and f"{float(number):g}" == number and gamma_of(float(number)):
            return PowerFunction(float(number))
    except ValueError:
        pass
    raise ValueError(f"{name!r}; legal: half-life-<samples>, power-<sigma_rel in (0, 0.288)> as in power-0.05")


class Ema:
    """The average of a model's trained parameters under one profile."""

    def __init__(self, model: nn.Module, profile: Profile) -> None:
        self.profile, self.samples = profile, 0
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in _trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module, samples: int) -> None:
        """Take in the parameters after `samples` samples in all."""
        keep = self.profile.keep(self.samples, samples)
        self.samples = samples
        params = [local_shard(p.detach()) for _, p in _trained(model)]
        averages = [local_shard(self.weights[name]) for name, _ in _trained(model)]
        torch._foreach_lerp_(averages, params, 1 - keep)


def _trained(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of width `sigma_rel` (EDM2 section 3.1).

    The density (gamma+1) tau^gamma on [0, 1] has variance (gamma+1) / ((gamma+2)^2 (gamma+3)), which
    falls with gamma from 1/12 at gamma = 0; bisection.

    Raises:
        ValueError: `sigma_rel` outside (0, 1/sqrt(12)).
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel is {sigma_rel}, legal is (0, 0.288)")
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if wide else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Snapshot:
    """A stored power-function average: its time in samples, its width, and where its weights are."""

    samples: int
    sigma_rel: float


def mixing_weights(snapshots: Sequence[Snapshot], samples: int, sigma_rel: float) -> Tensor:
    """Weights of stored averages that best make the profile of width `sigma_rel` at `samples`.

    Least squares in the space of profiles (EDM2 section 3.2): solve A w = b with A_ij = <p_i, p_j>,
    b_i = <p_i, p>; the integral of the product of two densities has a closed form.

    Returns:
        `n` float64, one weight per snapshot.
    """
    times = torch.tensor([float(s.samples) for s in snapshots], dtype=torch.float64)
    gammas = torch.tensor([gamma_of(s.sigma_rel) for s in snapshots], dtype=torch.float64)
    target_time = torch.tensor([float(samples)], dtype=torch.float64)
    target_gamma = torch.tensor([gamma_of(sigma_rel)], dtype=torch.float64)
    a = _overlap(times[:, None], gammas[:, None], times, gammas)
    b = _overlap(times[:, None], gammas[:, None], target_time, target_gamma)
    return torch.linalg.lstsq(a, b, driver="gelsd").solution[:, 0]


def _overlap(t1: Tensor, g1: Tensor, t2: Tensor, g2: Tensor) -> Tensor:
    """Integral of p1 p2, p(tau) = (g+1) tau^g / t^(g+1) on [0, t], in logs against overflow."""
    total = g1 + g2 + 1
    log = total * torch.minimum(t1, t2).log() - (g1 + 1) * t1.log() - (g2 + 1) * t2.log()
    return (g1 + 1) * (g2 + 1) / total * log.exp()


def reconstruct(
    snapshots: Sequence[tuple[Snapshot, Mapping[str, Tensor]]], samples: int, sigma_rel: float
) -> dict[str, Tensor]:
    """The average of width `sigma_rel` at `samples`, from stored averages (EDM2 section 3.2).

    Args:
        snapshots: each with its averages by parameter name, sharded or not.
        samples: time of the wanted average; at most that of the last snapshot.
        sigma_rel: its width.
    """
    mix = mixing_weights([s for s, _ in snapshots], samples, sigma_rel).tolist()
    names = snapshots[0][1].keys()
    out: dict[str, Tensor] = {}
    for name in names:
        parts = [w * weights[name].double() for w, (_, weights) in zip(mix, snapshots, strict=True)]
        out[name] = torch.stack(parts).sum(0).to(snapshots[0][1][name].dtype)
    return out
