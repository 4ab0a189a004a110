"""Training step: loss and gradients of a batch, every draw a function of (seed, sample).

The same sample meets the same noise, noise level, self-conditioning and dropout whatever batch,
rank or run it falls into; so training resumes exactly, and on another number of workers.

    draw(...)       everything random about a batch
    losses(...)     one loss per sample
    accumulate(...) the same, and gradients added to the model's
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.condition import KINDS, Condition
from model.generator import SmallVideo
from model.objective import Objective

_MASK = (1 << 64) - 1


def sample_key(seed: int, index: int, stream: str) -> int:
    """63-bit integer hash of (seed, sample index, stream), by two rounds of SplitMix64.

    Streams in use: noise, sigma, self_cond, layers, dropout, documents, small_noise, small_level.
    """
    state = _splitmix(_splitmix(seed & _MASK) ^ (index & _MASK))
    return _splitmix(state ^ zlib.crc32(stream.encode())) >> 1


def sample_generator(seed: int, index: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for one stream of one sample."""
    return torch.Generator(device=device).manual_seed(sample_key(seed, index, stream))


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Draws:
    """What is random about a batch.

    Attributes:
        eps: `b t c h w` unit Gaussian noise.
        sigma: `b` noise levels.
        self_conditioned: `b` bool, which samples get the latents of a first pass; None for nobody.
        keys: `b` int64 dropout keys of the layers.
        small: for upsamplers, the noise (`b t c h w`) and level (`b`) of the small video.
    """

    eps: Tensor
    sigma: Tensor
    self_conditioned: Tensor | None
    keys: Tensor
    small: SmallVideo | None = None


def draw(
    objective: Objective,
    shape: Sequence[int],
    *,
    seed: int,
    indices: Sequence[int],
    self_condition_rate: float = 0.9,
    max_small_level: float | None = None,
    device: torch.device | str = "cpu",
) -> Draws:
    """Draw the noise of a batch.

    Args:
        objective: the diffusion process (its distribution of noise levels), EDM's or another.
        shape: `t c h w` of one video.
        seed: of the run.
        indices: global position of each sample.
        self_condition_rate: share of samples that get a first pass; 0.9 in table 8 of Snap Video.
        max_small_level: upsamplers only: the small video's noise level is uniform in [0, this].
            Snap Video says "random level" and no more.
        device: where the tensors are made; the numbers depend on the kind of device.
    """

    def normal(stream: str) -> Tensor:
        videos = [
            torch.randn(*shape, generator=sample_generator(seed, i, stream, device), device=device)
            for i in indices
        ]
        return torch.stack(videos)

    sigma = objective.training_sigma(_scalars(torch.randn, seed, indices, "sigma"))
    chosen = _scalars(torch.rand, seed, indices, "self_cond") < self_condition_rate
    small = None
    if max_small_level is not None:
        level = _scalars(torch.rand, seed, indices, "small_level") * max_small_level
        small = SmallVideo(normal("small_noise"), level.to(device))
    return Draws(
        eps=normal("noise"),
        sigma=sigma.to(device),
        self_conditioned=chosen.to(device) if self_condition_rate > 0 else None,
        keys=torch.tensor([sample_key(seed, i, "layers") for i in indices], device=device),
        small=small,
    )


def _scalars(sampler, seed: int, indices: Sequence[int], stream: str) -> Tensor:
    draws = [sampler((), generator=sample_generator(seed, i, stream)) for i in indices]
    return torch.stack(draws)


def draw_dropped(rates: Mapping[str, float], *, seed: int, index: int) -> frozenset[str]:
    """Which condition kinds this sample must do without.

    Args:
        rates: probability per kind of `model.condition.KINDS`, and "all" for the whole prompt.
        seed: of the run.
        index: global position of the sample.

    Raises:
        ValueError: a kind that does not exist.
    """
    if unknown := set(rates) - set(KINDS) - {"all"}:
        raise ValueError(f"no condition kind {sorted(unknown)}; there are {[*KINDS, 'all']}")
    names = [*KINDS, "all"]
    uniform = torch.rand(len(names), generator=sample_generator(seed, index, "dropout"))
    dropped = {k for k, u in zip(names, uniform.tolist(), strict=True) if u < rates.get(k, 0.0)}
    return frozenset(KINDS) if "all" in dropped else frozenset(dropped)


def draw_num_documents(choices: Sequence[int], *, seed: int, index: int) -> int:
    """How many retrieved documents this sample reads, uniform over `choices` (RA-CM3: 0, 1, 2)."""
    generator = sample_generator(seed, index, "documents")
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def losses(
    model: nn.Module,
    objective: Objective,
    videos: Tensor,
    condition: Condition,
    draws: Draws,
    *,
    dtype: torch.dtype | None = None,
    dropout: bool = True,
    but_first: Tensor | None = None,
    small_size: tuple[int, int] | None = None,
) -> Tensor:
    """One loss per sample, as the process weighs it; latent self-conditioning as FIT and RIN.

    Args:
        model: a `Generator`, sharded and compiled or not.
        objective: the diffusion process of these videos.
        videos: `b t c h w` in [-1, 1].
        condition: the encoded prompts.
        draws: from `draw`.
        dtype: autocast to this; None computes in the parameters' type.
        dropout: use the layers' dropout (off in validation).
        but_first: `b` bool, whose loss leaves frame 0 out; None = where that frame is given.
        small_size: (height, width) in pixels of the small video that an upsampler starts from.

    Returns:
        `b` float32 losses.
    """
    keys = draws.keys if dropout else None
    given = condition.has_first_frame if videos.shape[1] > 1 else None
    x = network_input(objective, objective.add_noise(videos, draws.eps, draws.sigma), draws.sigma)
    if given is not None:
        x = with_first_frame(objective, x, videos[:, 0], given)
    small = None
    if draws.small is not None and small_size is not None:
        small = noisy_small(videos, small_size, draws.small)
    with autocast(videos.device, dtype):
        z_prev = None
        if draws.self_conditioned is not None and has_latents(model):
            with torch.no_grad():
                _, z = model(x, draws.sigma, condition, None, small=small, keys=keys, latents_only=True)
            z_prev = z * draws.self_conditioned[:, None, None].to(z.dtype)
        f, _ = model(x, draws.sigma, condition, z_prev, small=small, keys=keys)
    loss = objective.loss(f, videos, draws.eps, draws.sigma)
    but_first = given if but_first is None else but_first
    if but_first is None or videos.shape[1] == 1:
        return loss
    later = objective.loss(f[:, 1:], videos[:, 1:], draws.eps[:, 1:], draws.sigma)
    return torch.where(but_first, later, loss)


def accumulate(
    model: nn.Module,
    objective: Objective,
    videos: Tensor,
    condition: Condition,
    draws: Draws,
    *,
    divisor: float,
    dtype: torch.dtype | None = None,
    small_size: tuple[int, int] | None = None,
    timed: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Losses of a micro-batch, with the gradients of their sum over `divisor` added to the model's.

    With `divisor` the number of samples of the whole step (over the world size where gradients are
    averaged over ranks), any split of the step into micro-batches and ranks gives the same gradient.
    `timed` is the context of the parts "forward" and "backward", for a stopwatch.

    Returns:
        `b` float32 losses, detached.
    """
    with timed("forward"):
        each = losses(model, objective, videos, condition, draws, dtype=dtype, small_size=small_size)
    with timed("backward"):
        (each.sum() * (1 / divisor)).backward()
    return each.detach()


def network_input(objective: Objective, x_sigma: Tensor, sigma: Tensor) -> Tensor:
    """`b t c h w` noisy videos at `b` levels, scaled as the network takes them."""
    return x_sigma * objective.c_in(sigma).view(-1, 1, 1, 1, 1).to(x_sigma.dtype)


def with_first_frame(objective: Objective, x: Tensor, first: Tensor, given: Tensor) -> Tensor:
    """The network's input with frame 0 as it is without noise, where it is given: so a video goes on from it.

    Args:
        objective: the diffusion process.
        x: `b t c h w` from `network_input`.
        first: `b c h w` clean frames, on the scale of clean videos.
        given: `b` bool.
    """
    none = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    clean = first[:, None].to(x.dtype)
    clean = network_input(objective, objective.add_noise(clean, torch.zeros_like(clean), none), none)
    return torch.cat([torch.where(given.view(-1, 1, 1, 1, 1), clean, x[:, :1]), x[:, 1:]], dim=1)


def noisy_small(videos: Tensor, size: tuple[int, int], noise: SmallVideo) -> SmallVideo:
    """The training input of an upsampler: shrunk to `size`, enlarged back, and noised.

    `(small + level eps) / sqrt(1 + level^2)` keeps the variance; `noise.video` is the eps.
    """
    b, t = videos.shape[:2]
    small = F.interpolate(videos.flatten(0, 1), size=size, mode="area").unflatten(0, (b, t))
    return enlarge_small(small, tuple(videos.shape[-2:]), noise)


def enlarge_small(small: Tensor, size: tuple[int, ...], noise: SmallVideo) -> SmallVideo:
    """Enlarge a `b t c h w` small video to `size` and add the noise in `noise` at its level."""
    b, t = small.shape[:2]
    large = F.interpolate(small.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    level = noise.level.view(-1, 1, 1, 1, 1)
    noisy = (large.unflatten(0, (b, t)) + level * noise.video) / (1 + level**2).sqrt()
    return SmallVideo(noisy, noise.level)


def has_latents(model: nn.Module) -> bool:
    """Whether self-conditioning means anything to this model (a DiT carries nothing over)."""
    bare: Any = getattr(model, "module", model)  # DDP's wrapper knows nothing of it
    return bare.z_shape[0] > 0


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to `dtype`; nothing for None."""
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()
