"""Latent space: any diffusers autoencoder, frozen, between pixels and what the generator sees.

    pixels b t c h w in [-1, 1]  --encode-->  latents b t' c' h' w', about unit variance  --decode-->  pixels

An image autoencoder (AutoencoderKL, AutoencoderTiny, AutoencoderDC, ...) works frame by frame; a video
autoencoder (Wan, CogVideoX, HunyuanVideo, LTX, ...) also shortens time. Latents are standardised by what
the model's own config says: per-channel mean and deviation, or shift and scaling factor.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from infra.clip.hub import hub_file
from infra.config import Config
from infra.errors import ConfigError
from model.edm import sigma_in as pixel_sigma_in

CURE = "give a local folder with config.json and weights, or train in pixels (no latents in the config)"
PROBE_PX = 64
PROBE_FRAMES = (1, 17, 33)


class LatentConfig(Config):
    """Names an autoencoder."""

    model: str
    """Folder or hub id that holds a diffusers autoencoder's config.json and weights."""
    subfolder: str | None = "vae"
    """Folder inside it; used if it is there (pipelines keep their autoencoder under `vae`)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the arithmetic; auto = bfloat16 on a GPU, else float32. Latents come out in float32."""
    frames_per_call: int = 16
    """Frames that an image autoencoder takes at once, at least 1: bounds the memory."""

    @field_validator("frames_per_call")
    @classmethod
    def _is_positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("legal: at least 1")
        return value


class Latents:
    """A frozen autoencoder as two functions and the shapes between them."""

    def __init__(
        self, autoencoder: nn.Module, *, device: str | torch.device = "cpu", frames_per_call: int = 16
    ) -> None:
        """`autoencoder`: of diffusers, in the wanted dtype."""
        self.device = torch.device(device)
        self.model: Any = autoencoder.eval().requires_grad_(False).to(self.device)
        self.dtype = next(autoencoder.parameters()).dtype
        self.frames_per_call = frames_per_call
        self.is_video = any(isinstance(part, nn.Conv3d) for part in autoencoder.modules())
        self._shift, self._scale = _standards(self.model.config)
        self._measure()

    def _measure(self) -> None:
        """Learn the factors from what comes out: configs name them in too many ways."""
        first, second, third = (self._raw_shape(t) for t in (PROBE_FRAMES if self.is_video else (1, 1, 1)))
        self.channels = first[1]
        self.factor_px = PROBE_PX // first[2]
        """Pixels along a side of one latent."""
        self.factor_frames = 16 // (third[0] - second[0]) if self.is_video else 1
        """Frames to one latent in time (after the first, if the autoencoder is causal)."""
        self.is_causal = self.is_video and first[0] == 1 and second[0] == 1 + 16 // self.factor_frames

    @torch.no_grad()
    def _raw_shape(self, num_frames: int) -> tuple[int, int, int, int]:
        """(t', c', h', w') of a blank clip."""
        blank = torch.zeros(1, num_frames, 3, PROBE_PX, PROBE_PX, device=self.device)
        try:
            t, c, h, w = self._encode_raw(blank).shape[1:]
        except RuntimeError:
            if num_frames > 1:
                raise
            return 0, 0, 1, 1  # a video autoencoder that refuses a single frame
        return t, c, h, w

    def legal_frames(self, num_frames: int) -> int:
        """The next number of frames that the autoencoder keeps whole: 1 + n f if causal, n f if not."""
        first = 1 if self.is_causal else 0
        return first + -(-(num_frames - first) // self.factor_frames) * self.factor_frames

    def shape(self, num_frames: int, height_px: int, width_px: int) -> tuple[int, int, int, int]:
        """(t', c', h', w') of the latents of a clip.

        Raises:
            ConfigError: a side that the autoencoder can't divide; names the nearest legal one.
        """
        f = self.factor_px
        if height_px % f or width_px % f:
            legal = f"{-(-height_px // f) * f} x {-(-width_px // f) * f}"
            raise ConfigError(
                f"{height_px} x {width_px} pixels don't divide into latents of {f}",
                legal=f"multiples of {f}",
                cure=f"use {legal} (height x width)",
            )
        first = 1 if self.is_causal else 0
        frames = first + (self.legal_frames(num_frames) - first) // self.factor_frames
        return frames, self.channels, height_px // f, width_px // f

    def sigma_in(self, num_frames: int, height_px: int, width_px: int) -> float:
        """Snap Video's sigma_in = s sqrt(T) of the latent clip: latents count as pixels.

        Neighbouring latents share far less than neighbouring pixels, and what they share is what
        sigma_in makes up for (Snap Video section 3.1). So the *latent* grid and length go into the rule.
        """
        frames, _, height, width = self.shape(num_frames, height_px, width_px)
        return pixel_sigma_in(frames, height, width)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels `b t 3 h w` in [-1, 1] -> latents `b t' c' h' w'`, float32, about unit variance.

        On the autoencoder's device. The mean of the posterior is taken, so a clip has one encoding. A clip
        of a length that the autoencoder would cut is made longer by repeating its last frame.
        """
        num_frames = video.shape[1]
        self.shape(num_frames, *video.shape[-2:])
        extra = self.legal_frames(num_frames) - num_frames
        if extra:
            video = torch.cat([video, video[:, -1:].expand(-1, extra, -1, -1, -1)], dim=1)
        latents = self._encode_raw(video).float()
        return (latents - _like(self._shift, latents)) * _like(self._scale, latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, num_frames: int | None = None) -> Tensor:
        """Latents `b t' c' h' w'` -> pixels `b t 3 h w` in [-1, 1], float32.

        Args:
            latents: as from `encode`.
            num_frames: frames to keep (those before any repeated last frame); None = all.
        """
        raw = latents.to(self.device).float() / _like(self._scale, latents).to(self.device)
        raw = (raw + _like(self._shift, latents).to(self.device)).to(self.dtype)
        video = self._decode_raw(raw).float().clamp(-1, 1)
        return video[:, :num_frames]

    def _encode_raw(self, video: Tensor) -> Tensor:
        video = video.to(self.device, self.dtype)
        if self.is_video:
            return _latent_of(self.model.encode(video.transpose(1, 2))).transpose(1, 2)
        frames = video.flatten(0, 1).split(self.frames_per_call)
        latents = torch.cat([_latent_of(self.model.encode(some)) for some in frames])
        return latents.unflatten(0, video.shape[:2])

    def _decode_raw(self, latents: Tensor) -> Tensor:
        if self.is_video:
            return self.model.decode(latents.transpose(1, 2)).sample.transpose(1, 2)
        frames = latents.flatten(0, 1).split(self.frames_per_call)
        video = torch.cat([self.model.decode(some).sample for some in frames])
        return video.unflatten(0, latents.shape[:2])


def load_latents(config: LatentConfig, device: str | torch.device = "cpu") -> Latents:
    """Load the autoencoder that the config names.

    Raises:
        ConfigError: no such folder, not a diffusers autoencoder, or a hub that can't be reached.
    """
    place, subfolder = _find(config)
    device = torch.device(device)
    is_half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    import diffusers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        values: Any = AutoencoderKL.load_config(place, subfolder=subfolder)
        name = values.get("_class_name", "")
        kind = getattr(diffusers, name, None)
        if kind is None or not (hasattr(kind, "encode") and hasattr(kind, "decode")):
            raise ValueError(f"its class is {name!r}, which is no autoencoder of diffusers")
        model = kind.from_pretrained(
            place, subfolder=subfolder, torch_dtype=torch.bfloat16 if is_half else torch.float32
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"can't load the autoencoder {config.model!r}: {reason}", cure=CURE) from None
    return Latents(model, device=device, frames_per_call=config.frames_per_call)


def _find(config: LatentConfig) -> tuple[str, str | None]:
    """The folder or hub id, and the folder inside it if there is one."""
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        inside = config.subfolder and (folder / config.subfolder / "config.json").is_file()
        return str(folder), config.subfolder if inside else None
    names = [f"{config.subfolder}/config.json"] if config.subfolder else []
    found = hub_file(config.model, [*names, "config.json"], wanted=config.model, cure=CURE)
    return config.model, config.subfolder if Path(found).parent.name == config.subfolder else None


def _standards(config: Any) -> tuple[Tensor, Tensor]:
    """(shift, scale) per channel: latents are standardised as (z - shift) * scale."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    factor = config.get("scaling_factor")
    factor = 1.0 if factor is None else float(factor)
    if mean is not None and deviation is not None:
        # Wan's config gives mean and deviation only; where a factor stands too (LTX: 1.0) it multiplies.
        return torch.tensor(mean), factor / torch.tensor(deviation)
    return torch.tensor([config.get("shift_factor") or 0.0]), torch.tensor([factor])


def _like(values: Tensor, latents: Tensor) -> Tensor:
    """Per-channel values as `c 1 1`, for `b t c h w`."""
    return values.to(latents.device, torch.float32).view(-1, 1, 1)


def _latent_of(output: Any) -> Tensor:
    """The latent in any of diffusers' encoder outputs; of a distribution, its mode."""
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    return output.latents if hasattr(output, "latents") else output.latent
