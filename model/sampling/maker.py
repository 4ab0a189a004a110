"""A restored generator with what stands before and behind it: prompt encoder, guidance, autoencoder.

film(asked)            noise -> `t c h w` pixels, through the autoencoder's decoder in latent space
enlarge(video, asked)  the cascade's second stage
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from infra.errors import ConfigError
from model.condition import Prompt
from model.guidance import FULL, Guidance
from model.latents import open_latents
from model.prompt.encoder import PromptEncoder, load_prompt_encoder
from model.prompt.select import select
from model.sample import Denoiser, sample_ode, upsample
from model.sampling.config import GuidanceConfig
from model.sampling.restore import Restored
from model.step import sample_generator
from model.training.build import Conditioner
from model.training.stages import StageConfig
from model.training.targets import edm_of
from model.training.telemetry import say


@dataclass(frozen=True)
class Asked:
    """One video, as it is asked of a generator.

    Attributes:
        prompt: after the choice of documents.
        fps: frame rate to condition on.
        original_size_px: (height, width) to condition on.
        seed: of the noise.
    """

    prompt: Prompt
    fps: float
    original_size_px: tuple[int, int]
    seed: int


class HasEncoder(Protocol):
    """Another maker, or a model in training."""

    @property
    def config(self) -> StageConfig: ...
    @property
    def encoder(self) -> PromptEncoder: ...


class Maker:
    """Makes pixels with one restored generator."""

    def __init__(self, restored: Restored, guidance: GuidanceConfig, beside: HasEncoder | None = None) -> None:
        """`beside`: something else, whose prompt encoder is used too if it is the same one."""
        self.restored, self.config = restored, restored.config
        self.device = next(restored.model.parameters()).device
        if beside is not None and beside.config.encoder == self.config.encoder:
            encoder = beside.encoder
        else:
            encoder = load_prompt_encoder(self.config.encoder, self.device)
        check_encoder(encoder, restored)
        self.encoder: PromptEncoder = encoder
        self.condition = Conditioner(self.config, encoder, self.device)
        bounded = guidance if not restored.space.is_latent else guidance.model_copy(update={"threshold": None})
        self.guidance = Guidance(**bounded.model_dump())
        self.latents = open_latents(self.config.autoencoder, self.device)
        check_autoencoder(self.latents.space.identity if self.latents else "", restored)

    def film(
        self,
        asked: Asked,
        *,
        num_steps: int,
        num_frames: int | None = None,
        size_px: tuple[int, int] | None = None,
    ) -> Tensor:
        """`t c h w` pixels in about [-1, 1]; `num_frames` and `size_px` (height, width) None = as trained."""
        num_frames = num_frames or self.config.num_frames
        size = size_px or (self.config.height_px, self.config.width_px)
        shape = self.restored.space.shape(num_frames, *size)
        noise = self._noise(asked.seed, "noise", shape)
        denoiser = self._denoiser(asked, shape)
        x = sample_ode(denoiser, denoiser.edm, noise, num_steps=num_steps)
        return (x if self.latents is None else self.latents.decode(x, num_frames))[0]

    def enlarge(self, video: Tensor, asked: Asked, *, num_steps: int, level: float) -> Tensor:
        """`t c H W` pixels out of a small video `t c h w`; this generator is an upsampler.

        Args:
            video: from the base model.
            asked: as it was asked of the base model.
            num_steps: of sampling.
            level: standard deviation of the noise that the small video gets.
        """
        shape = (video.shape[0], video.shape[1], self.config.height_px, self.config.width_px)
        denoiser = self._denoiser(asked, shape)
        return upsample(
            denoiser,
            video[None].clamp(-1, 1).float(),
            self._noise(asked.seed, "large_noise", shape),
            self._noise(asked.seed, "small_noise", shape),
            level=level,
            num_steps=num_steps,
        )[0]

    def _noise(self, seed: int, stream: str, shape: tuple[int, ...]) -> Tensor:
        generator = sample_generator(seed, 0, stream, self.device)
        return torch.randn((1, *shape), generator=generator, device=self.device)

    def _denoiser(self, asked: Asked, shape: tuple[int, ...]) -> Denoiser:
        size = torch.tensor([asked.original_size_px]).float()
        conditions = {
            branch: self.condition([select(asked.prompt, None, branch)], torch.tensor([asked.fps]), size)
            for branch in {FULL, *self.guidance.branches}
        }
        return Denoiser(
            self.restored.model,
            edm_of(self.config, shape),
            conditions,
            self.guidance,
            dtype=torch.bfloat16 if self.config.parallel.dtype == "bfloat16" else None,
        )


def check_encoder(encoder: PromptEncoder, restored: Restored) -> None:
    """Refuse an encoder of another width; say so when its weights or arithmetic differ."""
    if encoder.dim != restored.facts["token_dim"]:
        raise ConfigError(
            f"the prompt encoder gives {encoder.dim} numbers a token, {restored.uri} was trained with "
            f"{restored.facts['token_dim']}",
            cure="use the encoder that the run was trained with",
        )
    if encoder.identity_hash != restored.facts["encoder"]:
        say(f"  note: {restored.uri} was trained with other weights or arithmetic of its prompt encoder")


def check_autoencoder(identity: str, restored: Restored) -> None:
    """Refuse latents that mean something else than in training."""
    if identity != restored.space.identity:
        raise ConfigError(
            f"the autoencoder {restored.config.autoencoder} is not the one that {restored.uri} was "
            f"trained with ({restored.space.identity[:12]} there, {identity[:12]} now)",
            cure="put the trained one back in its place",
        )
