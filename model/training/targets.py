"""What the generator learns to make, out of a batch: pixels or latents, and an upsampler's small video.

targets(batch)     x, `b t c h w`        targets.edm(x)      its diffusion process
targets.draw(...)  all that is random about the batch
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from infra.errors import TrainingError
from model.data.batch import Batch
from model.data.inputs import InputConfig
from model.edm import Edm, edm_for
from model.encodings.store import Encodings
from model.generator import SmallVideo
from model.latents import Latents, open_latents
from model.space import PIXELS, Space
from model.step import Draws, draw, sample_generator
from model.training.stages import StageConfig


class Targets:
    """The way of the targets of one run into its generator.

    Attributes:
        space: pixels, or latents of the frozen autoencoder.
        small_size: (height, width) in pixels of an upsampler's small video; None for a base model.
    """

    def __init__(self, config: StageConfig, device: torch.device, encodings: Encodings | None = None) -> None:
        """`encodings`: their latents, if they hold any, spare loading the autoencoder."""
        self.config, self.device = config, device
        self.space = space_of(encodings) or (self.latents.space if self.latents else PIXELS)
        up = config.upsampler
        self.small_size = up.small_size_px if up else None

    def __call__(self, batch: Batch) -> Tensor:
        """`b t c h w` of a batch, on the device. Clips go through the autoencoder one by one: so the latents
        of a clip are the same to the last bit whatever it is batched with, which exact resume needs.
        """
        if batch.latents is not None:
            return batch.latents.to(self.device, non_blocking=True)
        pixels = batch.target(self.device)
        if self.latents is None:
            return pixels
        return torch.cat([self.latents.encode(clip[None]) for clip in pixels])

    @cached_property
    def latents(self) -> Latents | None:
        """The autoencoder, loaded when it is needed; None for pixels."""
        return open_latents(self.config.autoencoder, self.device)

    def edm(self, x: Tensor) -> Edm:
        """The process of targets of this shape, with the run's distribution of noise levels."""
        return edm_of(self.config, x.shape)

    def draw(self, x: Tensor, positions: Sequence[int]) -> Draws:
        """All that is random about a training batch."""
        return draw(
            self.edm(x),
            x.shape[1:],
            seed=self.config.seed,
            indices=positions,
            self_condition_rate=self.config.self_condition_rate,
            max_small_level=self.config.upsampler.max_level if self.config.upsampler else None,
            device=self.device,
        )

    def fixed_small(self, x: Tensor, key: int) -> SmallVideo | None:
        """For validation, the small video's noise by the sample's key, at half the largest level."""
        if self.config.upsampler is None:
            return None
        generator = sample_generator(0, key, "small_noise", self.device)
        noise = torch.randn(x.shape[1:], generator=generator, device=self.device)
        level = self.config.upsampler.max_level / 2
        return SmallVideo(noise.expand(x.shape), torch.full((len(x),), level, device=self.device))


def space_of(encodings: Encodings | None) -> Space | None:
    """The space of latents that were encoded beforehand; None where there are none."""
    if encodings is None or encodings.facts.autoencoder_content is None:
        return None
    return Space(**encodings.facts.space)


def open_space(config: InputConfig, encodings: Encodings | None = None) -> Space:
    """The space of a config, for the door: the autoencoder is loaded on the CPU and measured.

    Raises:
        ConfigError: no such autoencoder, or sides of the clips that it can't divide.
    """
    space = space_of(encodings)
    if space is None:
        latents = open_latents(config.autoencoder)
        space = latents.space if latents else PIXELS
    for bucket in config.shapes:
        space.shape(bucket.num_frames, bucket.height_px, bucket.width_px)
    return space


def edm_of(config: StageConfig, shape: Sequence[int]) -> Edm:
    """The diffusion process of a run for tensors `... t c h w`: sigma_in follows from their own shape."""
    t, _, h, w = shape[-4:]
    process = edm_for(t, h, w, sigma_data=config.sigma_data)
    return replace(process, log_mean=config.noise_log_mean, log_std=config.noise_log_std)


def check_same_space(space: Space, facts: dict[str, object], checkpoint: str) -> None:
    """Refuse latents of another autoencoder than the checkpoint's.

    Raises:
        TrainingError: they differ.
    """
    there = space_in(facts)
    if there != space:
        raise TrainingError(
            f"{checkpoint} was trained in {describe_space(there)}, this run works in {describe_space(space)}"
        )


def space_in(facts: dict[str, object]) -> Space:
    """The space that a checkpoint was trained in; older ones knew pixels only."""
    values = facts.get("space")
    return Space(**values) if isinstance(values, dict) else PIXELS


def describe_space(space: Space) -> str:
    return f"latents of autoencoder {space.identity[:12]}" if space.is_latent else "pixels"
