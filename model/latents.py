"""Latent space: any diffusers autoencoder, frozen, between pixels and what the generator sees.

    pixels b t c h w in [-1, 1]  --encode-->  latents b t' c' h' w', about unit variance  --decode-->  pixels

An image autoencoder (AutoencoderKL, AutoencoderTiny, AutoencoderDC, ...) works frame by frame; a video
autoencoder (Wan, CogVideoX, HunyuanVideo, LTX, ...) also shortens time. Latents are standardised by what
the model's own config says: per-channel mean and deviation, or shift and scaling factor.
"""

import json
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from infra.clip.hub import hub_file
from infra.clip.model import hash_weights
from infra.config import Config, canonical_json
from infra.errors import ConfigError
from infra.storage import absolute
from model.space import Space

CURE = "give a local folder with config.json and weights, or train in pixels (autoencoder.kind: none)"
PROBE_PX = 64
PROBE_FRAMES = (1, 17, 33)


class LatentConfig(Config):
    """Pixels, or the latents of an autoencoder: one switch, from which all shapes and sigma_in follow."""

    kind: Literal["none", "diffusers"] = "none"
    """none = pixels, as Snap Video and VIMI; diffusers = any autoencoder of that library."""
    model: str | None = None
    """diffusers: folder or hub id that holds an autoencoder's config.json and weights."""
    subfolder: str | None = "vae"
    """Folder inside it; used if it is there (pipelines keep their autoencoder under `vae`)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the arithmetic; auto = bfloat16 on a GPU, else float32. Latents come out in float32."""
    frames_per_call: int = Field(default=16, ge=1)
    """Frames that an image autoencoder takes at once: bounds the memory."""

    @model_validator(mode="after")
    def _model_is_named(self) -> "LatentConfig":
        if (self.kind == "diffusers") != bool(self.model):
            raise ValueError(
                f"kind {self.kind} with model {self.model!r}; legal: kind diffusers with a model, or kind none"
            )
        return self


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

    @cached_property
    def space(self) -> Space:
        """Shapes, learned from what comes out: configs name the factors in too many ways."""
        probes = PROBE_FRAMES if self.is_video else (1, 1, 1)
        first, second, third = (self._raw_shape(t) for t in probes)
        factor_frames = 16 // (third[0] - second[0]) if self.is_video else 1
        return Space(
            channels=first[1] or second[1],
            factor_px=PROBE_PX // second[2],
            factor_frames=factor_frames,
            is_causal=self.is_video and first[0] == 1 and second[0] == 1 + 16 // factor_frames,
            identity=self.identity_hash,
        )

    @cached_property
    def identity_hash(self) -> str:
        """Hex sha256 of class, config and weights: what a latent means."""
        values = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
        parts = {"class": type(self.model).__name__, "config": json.dumps(values, sort_keys=True, default=str)}
        weights = hash_weights(self.model, torch.bfloat16)
        return sha256(canonical_json({**parts, "weights": weights})).hexdigest()

    @cached_property
    def content_hash(self) -> str:
        """Hex sha256 of the identity and the arithmetic: equal only if latents are equal to the bit."""
        arithmetic = [str(self.dtype), self.device.type, self.frames_per_call, hash_weights(self.model)]
        return sha256(canonical_json([self.identity_hash, arithmetic])).hexdigest()

    @torch.no_grad()
    def _raw_shape(self, num_frames: int) -> tuple[int, int, int, int]:
        """(t', c', h', w') of a blank clip."""
        blank = torch.zeros(1, num_frames, 3, PROBE_PX, PROBE_PX, device=self.device)
        try:
            t, c, h, w = self._encode_raw(blank).shape[1:]
        except RuntimeError:
            if num_frames > 1:
                raise
            return 0, 0, 0, 0  # a video autoencoder that refuses a single frame
        return t, c, h, w

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels `b t 3 h w` in [-1, 1] -> latents `b t' c' h' w'`, float32, about unit variance.

        On the autoencoder's device. The mean of the posterior is taken, so a clip has one encoding. A clip
        of a length that the autoencoder would cut is made longer by repeating its last frame.
        """
        num_frames = video.shape[1]
        self.space.shape(num_frames, *video.shape[-2:])
        extra = self.space.legal_frames(num_frames) - num_frames
        if extra:
            video = torch.cat([video, video[:, -1:].expand(-1, extra, -1, -1, -1)], dim=1)
        # In and out in the common layout: convolutions and sums over another one round otherwise.
        latents = self._encode_raw(video.contiguous()).float()
        return ((latents - _like(self._shift, latents)) * _like(self._scale, latents)).contiguous()

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


def open_latents(config: LatentConfig, device: torch.device | str = "cpu") -> Latents | None:
    """The autoencoder; None for pixels."""
    return None if config.kind == "none" else load_latents(config, device)


def resolve_latents(config: LatentConfig) -> LatentConfig:
    """The same with an absolute folder; ids of the hub stay as they are."""
    if config.model is None or not Path(config.model).expanduser().exists():
        return config
    return config.model_copy(update={"model": absolute(config.model)})


def _find(config: LatentConfig) -> tuple[str, str | None]:
    """The folder or hub id, and the folder inside it if there is one."""
    assert config.model is not None
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
