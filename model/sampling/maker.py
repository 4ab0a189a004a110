"""Sampling pipeline of one checkpoint: prompt encoder, generator with guidance, autoencoder.

films(requests)            noise -> `b t c h w` pixels, through the autoencoder's decoder in latent space
enlarge(videos, requests)  the cascade's second stage
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from infra.config import Config
from infra.errors import ConfigError
from model.condition import Prompt
from model.data.sample import fit_frames
from model.generator import Generator
from model.guidance import FULL, Guidance
from model.latents import Latents, open_latents
from model.prompt.encoder import PromptEncoder
from model.prompt.load import load_prompt_encoder
from model.prompt.pictures import decode_as_it_is, first_frame
from model.prompt.select import select
from model.sample import Denoiser, sample_ode, upsample
from model.sampling.requests import SampleRequest
from model.space import PIXELS
from model.step import sample_generator
from model.training.build import Conditioner, objective_of
from model.training.config import StageConfig
from model.training.parallel import AUTOCAST
from model.training.state import Restored


class GuidanceConfig(Config):
    """How estimates with and without parts of the prompt are combined (model/guidance.py)."""

    scheme: Literal["none", "cfg", "retrieval", "alchemist", "phantom"] = "cfg"
    """cfg: classifier-free guidance, as Snap Video; the others weigh text and pictures apart."""
    weight: float = Field(default=4.0, ge=-1000, le=1000)
    """1 = no guidance (cfg). Snap Video sweeps 0 to 16 and does not state its choice; 4 is ours."""
    image_weight: float = Field(default=1.0, ge=-1000, le=1000)
    """Of the pictures, in schemes that weigh them apart."""
    threshold: float | None = Field(default=0.995, gt=0, le=1)
    """Quantile of dynamic thresholding, which Snap Video uses; 0.995 is Imagen's. null = off, and always
    off in latents, which have no bounds."""
    oscillate_from: int | None = Field(default=None, ge=0)
    """Step from which the weight oscillates with 1, which Snap Video does; null = constant."""


class Maker:
    """Makes pixels with one generator.

    `latents` None: it works in pixels.
    """

    def __init__(
        self,
        model: Generator,
        config: StageConfig,
        encoder: PromptEncoder,
        latents: Latents | None,
        guidance: GuidanceConfig,
    ) -> None:
        self.model, self.config, self.encoder, self.latents = model, config, encoder, latents
        self.device = next(model.parameters()).device
        self.space = latents.space if latents else PIXELS
        self.condition = Conditioner(config, encoder, self.device, self.space, lambda: latents)
        bounded = guidance if latents is None else guidance.model_copy(update={"threshold": None})
        self.guidance = Guidance(**bounded.model_dump())

    def films(
        self,
        requests: Sequence[SampleRequest],
        *,
        num_steps: int,
        num_frames: int | None = None,
        size_px: tuple[int, int] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """`b t c h w` pixels in about [-1, 1]; `num_frames` and `size_px` (height, width) None = as trained."""
        num_frames = num_frames or self.config.num_frames
        height, width = size_px or (self.config.height_px, self.config.width_px)
        shape = (num_frames, 3, height, width)
        if self.latents is not None:
            shape = self.latents.space.shape(num_frames, height, width)
        noise = self._noise(requests, "noise", shape)
        denoiser = self._denoiser(requests, shape)
        if num_frames > 1:
            denoiser.first = self._first_frames(requests, height, width)
        x = sample_ode(denoiser, denoiser.objective, noise, num_steps=num_steps, on_step=on_step)
        if self.latents is None:
            return x
        return torch.cat([self.latents.decode(one[None], num_frames) for one in x])

    def enlarge(
        self,
        videos: Tensor,
        requests: Sequence[SampleRequest],
        *,
        num_steps: int,
        level: float,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """`b t c H W` pixels out of small videos `b t c h w`; this generator is an upsampler.

        The small videos get noise of the standard deviation `level`.
        """
        shape = (videos.shape[1], videos.shape[2], self.config.height_px, self.config.width_px)
        denoiser = self._denoiser(requests, shape)
        denoiser.first = self._first_frames(requests, *shape[2:])
        return upsample(
            denoiser,
            videos.clamp(-1, 1).float(),
            self._noise(requests, "large_noise", shape),
            self._noise(requests, "small_noise", shape),
            level=level,
            num_steps=num_steps,
            on_step=on_step,
        )

    def _first_frames(self, requests: Sequence[SampleRequest], height_px: int, width_px: int) -> Tensor | None:
        """`b c h w` first frames that the prompts give, where the generator sees them as they are."""
        prompts = [request.prompt for request in requests]
        if self.condition.has_first_frame(prompts) is None:
            return None
        frames = np.stack([_first_frame(prompt, height_px, width_px) for prompt in prompts])
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1.0
        if self.latents is None:
            return pixels
        return torch.cat([self.latents.encode(one[None, None])[:, 0] for one in pixels])

    def _noise(self, requests: Sequence[SampleRequest], stream: str, shape: tuple[int, ...]) -> Tensor:
        drawn = []
        for request in requests:
            generator = sample_generator(request.seed, request.noise_index, stream, self.device)
            drawn.append(torch.randn(shape, generator=generator, device=self.device))
        return torch.stack(drawn)

    def _denoiser(self, requests: Sequence[SampleRequest], shape: tuple[int, ...]) -> Denoiser:
        fps = torch.tensor([request.fps for request in requests])
        size = torch.tensor([request.original_size_px for request in requests]).float()
        conditions = {
            branch: self.condition([select(request.prompt, None, branch) for request in requests], fps, size)
            for branch in {FULL, *self.guidance.branches}
        }
        dtype = AUTOCAST[self.config.parallel.dtype]
        objective = objective_of(self.config, shape)
        return Denoiser(self.model, objective, conditions, self.guidance, dtype=dtype)


def _first_frame(prompt: Prompt, height_px: int, width_px: int) -> np.ndarray:
    """uint8 `h w 3`: the picture resized and cropped as a target's frames are; black where there is none."""
    found = first_frame(prompt)
    if found is None:
        return np.zeros((height_px, width_px, 3), np.uint8)
    return fit_frames(np.asarray(decode_as_it_is(found.image))[None], height_px, width_px)[0]


def open_maker(restored: Restored, guidance: GuidanceConfig, *, beside: Maker | None = None) -> Maker:
    """A restored generator with its encoder and autoencoder, loaded and checked.

    The prompt encoder of the maker `beside` it is used too if it is the same one.

    Raises:
        ConfigError: another encoder or another autoencoder than in training.
    """
    device, config = next(restored.model.parameters()).device, restored.config
    if beside is not None and beside.config.encoder == config.encoder:
        encoder = beside.encoder
    else:
        encoder = load_prompt_encoder(config.encoder, device)
    check_encoder(encoder, restored)
    latents = open_latents(config.autoencoder, device)
    check_autoencoder(latents, restored)
    return Maker(restored.model, config, encoder, latents, guidance)


def check_encoder(encoder: PromptEncoder, restored: Restored) -> None:
    """Refuse another prompt encoder than that of the training.

    Raises:
        ConfigError: it is another.
    """
    _refuse_other("prompt encoder", restored.facts["encoder"], encoder.identity_hash, restored.uri)


def check_autoencoder(latents: Latents | None, restored: Restored) -> None:
    """Refuse another autoencoder than that of the training.

    Raises:
        ConfigError: it is another.
    """
    identity = latents.space.identity if latents else ""
    _refuse_other(
        f"autoencoder than {restored.config.autoencoder}", restored.space.identity, identity, restored.uri
    )


def _refuse_other(what: str, there: str, now: str, uri: str) -> None:
    if now != there:
        raise ConfigError(
            f"{uri} was trained with another {what}: its weights or limits differ "
            f"({there[:12]} there, {now[:12]} now)",
            cure="put the trained one back in its place",
        )
