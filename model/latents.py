"""Latents of any frozen diffusers autoencoder: encode, decode, normalise.

    pixels b t c h w in [-1, 1]  --encode-->  latents b t' c' h' w', about unit variance  --decode-->  pixels

An image autoencoder (AutoencoderKL, AutoencoderTiny, AutoencoderDC, ...) works frame by frame; a video
autoencoder (Wan, CogVideoX, HunyuanVideo, LTX, ...) also shortens time. Latents are standardised by what
the model itself says, in its config or beside its weights: per-channel mean and deviation, or shift and
scaling factor.
"""

import json
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.clip.model import hash_weights
from infra.config import canonical_json
from infra.hub import hub_file
from infra.pretrained import hash_stored_weights, or_refused
from model.space import Space

CURE = "give a local folder with config.json and weights, or train in pixels (autoencoder: null)"
SUBFOLDER = "vae"
"""Where pipelines keep their autoencoder: looked up first."""
FRAMES_PER_CALL = 16
"""Frames that an image autoencoder takes at once: bounds the memory. Ours."""
DECODER_SEED = 0
"""Of what a decoder draws itself, as LTX 0.9.1's does: a video is a function of its latents. Ours."""
PROBE_PX = 64
PROBE_FRAMES = (1, 17, 33)


class Latents:
    """A frozen autoencoder as two functions and the shapes between them."""

    def __init__(
        self,
        autoencoder: nn.Module,
        *,
        device: str | torch.device = "cpu",
        frames_per_call: int = FRAMES_PER_CALL,
        weight_hash: str | None = None,
    ) -> None:
        """`autoencoder`: of diffusers, in the wanted dtype.

        `weight_hash`: of the files that it came from; None = of itself, rounded.
        """
        self.device = torch.device(device)
        self.model: Any = autoencoder.eval().requires_grad_(False).to(self.device)
        self.dtype = next(autoencoder.parameters()).dtype
        self.frames_per_call, self.weight_hash = frames_per_call, weight_hash
        self.is_video = any(isinstance(part, nn.Conv3d) for part in autoencoder.modules())
        self._shift, self._scale = _standards(self.model)

    @cached_property
    def space(self) -> Space:
        """Shapes, and the identity of what makes them."""
        return self.measure(self.identity_hash)

    def measure(self, identity: str) -> Space:
        """Shapes, learned from what comes out: configs name the factors in too many ways."""
        probes = PROBE_FRAMES if self.is_video else (1, 1, 1)
        first, second, third = (self._raw_shape(t) for t in probes)
        factor_frames = 16 // (third[0] - second[0]) if self.is_video else 1
        return Space(
            channels=first[1] or second[1],
            factor_px=PROBE_PX // second[2],
            factor_frames=factor_frames,
            is_causal=self.is_video and first[0] == 1 and second[0] == 1 + 16 // factor_frames,
            identity=identity,
        )

    @cached_property
    def identity_hash(self) -> str:
        """Hex sha256 of class, config and weights: what a latent means."""
        values = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
        parts = {"class": type(self.model).__name__, "config": json.dumps(values, sort_keys=True, default=str)}
        weights = self.weight_hash or hash_weights(self.model, torch.bfloat16)
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

        `num_frames` are kept (those before any repeated last frame); None = all.
        """
        raw = latents.to(self.device).float() / _like(self._scale, latents).to(self.device)
        raw = (raw + _like(self._shift, latents).to(self.device)).to(self.dtype)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(DECODER_SEED)
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
            more: dict[str, Tensor] = {}
            if self.model.config.get("timestep_conditioning"):  # its pipeline's decode_timestep: no noise left
                more = {"temb": latents.new_zeros(len(latents))}
            return self.model.decode(latents.transpose(1, 2), **more).sample.transpose(1, 2)
        frames = latents.flatten(0, 1).split(self.frames_per_call)
        video = torch.cat([self.model.decode(some).sample for some in frames])
        return video.unflatten(0, latents.shape[:2])


def load_latents(place: str, device: str | torch.device = "cpu") -> Latents:
    """Load an autoencoder of diffusers; bfloat16 on a GPU, else float32.

    `place` is a folder or hub id that holds its config.json and weights, there or under `vae`.

    Raises:
        ConfigError: no such folder, not a diffusers autoencoder, or a hub that can't be reached.
    """
    device, dtype = torch.device(device), torch.float32
    with or_refused(f"can't load the autoencoder {place!r}", cure=CURE):
        kind, _, source, subfolder = _read(place)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = kind.from_pretrained(source, subfolder=subfolder, torch_dtype=dtype)
        return Latents(model, device=device, weight_hash=hash_stored_weights(_find(place)[2]))


def outline_latents(place: str) -> tuple[Space, int]:
    """Shapes and parameters of an autoencoder by its config alone, on the meta device.

    Raises:
        ConfigError: as `load_latents`.
    """
    with or_refused(f"can't read the autoencoder {place!r}", cure=CURE):
        kind, values, _, _ = _read(place)
        with torch.device("meta"):
            model = kind.from_config(values)
        space = Latents(model, device="meta").measure(identity=place)
    return space, sum(p.numel() for p in model.parameters())


def _read(place: str) -> tuple[Any, Any, str, str | None]:
    """(class, config, folder or id, folder inside it) of an autoencoder of diffusers."""
    source, subfolder, here = _find(place)
    import diffusers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    values: Any = AutoencoderKL.load_config(str(here))
    name = values.get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if kind is None or not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise ValueError(f"its class is {name!r}, which is no autoencoder of diffusers")
    return kind, values, source, subfolder


def open_latents(place: str | None, device: torch.device | str = "cpu") -> Latents | None:
    """The autoencoder; None for pixels."""
    return None if place is None else load_latents(place, device)


def _find(place: str) -> tuple[str, str | None, Path]:
    """The folder or hub id, the folder inside it if there is one, and where that lies on this machine."""
    folder, names = Path(place).expanduser(), [f"{SUBFOLDER}/config.json", "config.json"]
    if folder.is_dir():
        inside = folder / SUBFOLDER
        is_inside = (inside / "config.json").is_file()
        return str(folder), SUBFOLDER if is_inside else None, inside if is_inside else folder
    found = Path(hub_file(place, names, wanted=place, cure="")).parent  # its caller says the cure
    return place, SUBFOLDER if found.name == SUBFOLDER else None, found


def _standards(model: Any) -> tuple[Tensor, Tensor]:
    """(shift, scale) per channel: latents are standardised as (z - shift) * scale."""
    config = model.config
    said = {name: value for name, value in config.items() if value is not None}
    beside = dict(model.named_buffers(recurse=False))  # there LTX keeps what Wan has in its config
    mean, deviation = (said.get(name, beside.get(name)) for name in ("latents_mean", "latents_std"))
    factor = config.get("scaling_factor")
    factor = 1.0 if factor is None else float(factor)
    if mean is not None and deviation is not None:
        # Wan gives mean and deviation only; where a factor stands too (LTX: 1.0) it multiplies.
        mean, deviation = (torch.as_tensor(values).float() for values in (mean, deviation))
        return mean, factor / deviation
    return torch.tensor([config.get("shift_factor") or 0.0]), torch.tensor([factor])


def _like(values: Tensor, latents: Tensor) -> Tensor:
    """Per-channel values as `c 1 1`, for `b t c h w`."""
    return values.to(latents.device, torch.float32).view(-1, 1, 1)


def _latent_of(output: Any) -> Tensor:
    """The latent in any of diffusers' encoder outputs; of a distribution, its mode."""
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    return output.latents if hasattr(output, "latents") else output.latent
