"""The generator: a condition embedder in front of a backbone, and the table of named sizes."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.condition import NUM_FEATURES, Condition, ConditionConfig, ConditionEmbedder, fourier_features
from model.dit import Dit, DitConfig
from model.fit import Fit
from model.fit_layout import FitConfig

BackboneConfig = FitConfig | DitConfig

_BILLIONS = FitConfig(
    patch_dim=1024, patch_head_dim=64, num_latents=768, latent_dim=3072, latent_head_dim=128,
    condition_dim=1024,
)  # fmt: skip
PRESETS: dict[str, BackboneConfig] = {
    # Snap Video's table 8
    "fit-500m": FitConfig(),
    "fit-3.9b": _BILLIONS,
    "fit-3.9b-upsampler": replace(
        _BILLIONS, height_px=288, width_px=512, group_height=18, group_width=16, in_channels=6
    ),
    # for laptops and tests; sizes are this project's
    "fit-small": FitConfig(
        patch_dim=256, patch_head_dim=64, num_latents=256, latent_dim=512, latent_head_dim=64,
        condition_dim=256, num_blocks=4, layers_per_block=3, dropout=0.0,
    ),
    "fit-tiny": FitConfig(
        patch_dim=64, patch_head_dim=32, num_latents=64, latent_dim=256, latent_head_dim=64,
        condition_dim=128, num_blocks=2, layers_per_block=2, dropout=0.0,
    ),
    "dit-small": DitConfig(dim=384, head_dim=64, condition_dim=256, num_blocks=12),
    "dit-tiny": DitConfig(dim=256, head_dim=64, condition_dim=128, num_blocks=5),
}  # fmt: skip


def preset(name: str, **changes: Any) -> BackboneConfig:
    """A named backbone, with fields changed: `preset("fit-tiny", num_frames=8, height_px=24)`.

    Raises:
        ValueError: no such preset, or no such field.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    try:
        return replace(PRESETS[name], **changes)
    except TypeError as error:
        raise ValueError(f"preset {name!r}: {error}") from None


@dataclass(frozen=True)
class SmallVideo:
    """What the upsampler starts from.

    Attributes:
        video: `b t c h w` the small video, enlarged to the target size, with its noise on.
        level: `b` standard deviation of that noise.
    """

    video: Tensor
    level: Tensor


class Generator(nn.Module):
    """Noisy video, noise level and condition to the network's answer F and its latents."""

    def __init__(self, backbone: BackboneConfig, condition: ConditionConfig) -> None:
        super().__init__()
        self.backbone_config, self.condition_config = backbone, condition
        self.embedder = ConditionEmbedder(condition, backbone.condition_dim)
        self.backbone = Fit(backbone) if isinstance(backbone, FitConfig) else Dit(backbone)
        self.level = nn.Linear(NUM_FEATURES, backbone.condition_dim) if self.is_upsampler else None

    @property
    def is_upsampler(self) -> bool:
        """The input carries the small video beside the noisy one."""
        return self.backbone_config.in_channels > self.backbone_config.out_channels

    @property
    def blocks(self) -> nn.ModuleList:
        """The units of sharding, recomputation and compilation."""
        return self.backbone.blocks

    @property
    def z_shape(self) -> tuple[int, int]:
        """Shape of one sample's latents."""
        return self.backbone.z_shape

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place; call it before sharding."""
        for block in self.blocks:
            block.compile(**options)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        z_prev: Tensor | None = None,
        *,
        small: SmallVideo | None = None,
        keys: Tensor | None = None,
        latents_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One evaluation.

        Args:
            x: `b t c h w` noisy video, already scaled by c_in.
            sigma: `b` noise levels.
            condition: the encoded prompts.
            z_prev: `b m d` latents of an earlier evaluation of the same samples; None equals zeros.
            small: the upsampler's low-resolution video, None for a base model.
            keys: `b` int64 dropout keys; None switches dropout off.
            latents_only: the answer is not wanted (the first pass of self-conditioning), and comes back
                empty; for backbones that have latents.

        Returns:
            `b t c h w` answer F and `b m d` latents.
        """
        tokens, mask = self.embedder(sigma, condition)
        if self.level is not None:
            if small is None:
                raise ValueError("an upsampler needs the small video")
            x = torch.cat([x, small.video.to(x.dtype)], dim=2)
            features = fourier_features((small.level.float() + 1e-3).log() / 4)
            level = self.level(features.to(self.level.weight.dtype))[:, None]
            # Behind the scalars, so that DiT still finds those first.
            tokens = torch.cat([tokens, level.to(tokens.dtype)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(condition), 1)], dim=1)
        if latents_only and isinstance(self.backbone, Fit):
            return x.new_zeros(0), self.backbone.think(x, tokens, mask, keys)
        return self.backbone(x, tokens, mask, z_prev, keys)


def start_upsampler(upsampler: Generator, base: Generator) -> list[str]:
    """Copy the base model into the upsampler (Snap Video: "initialised from base").

    The patch embedding takes the base's weights for the noisy video and zeros for the small one.

    Returns:
        Names of the tensors that have no counterpart of the same shape and keep their own start.
    """
    mine, theirs, fresh = upsampler.state_dict(), base.state_dict(), []
    with torch.no_grad():
        for name, value in mine.items():
            source = theirs.get(name)
            if source is not None and source.shape == value.shape:
                value.copy_(source)
            elif source is not None and name == "backbone.embed.weight":
                value.zero_()
                value[:, : source.shape[1]].copy_(source)
            else:
                fresh.append(name)
    return fresh
