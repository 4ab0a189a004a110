"""The generator: a condition embedder in front of a backbone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.backbones.base import Backbone, BackboneConfig
from model.condition import NUM_FEATURES, Condition, ConditionConfig, ConditionEmbedder, fourier_features


@dataclass(frozen=True)
class SmallVideo:
    """What the upsampler starts from.

    Attributes:
        video: `b t c h w` the small video, enlarged to the target size, with its noise on.
        level: `b` standard deviation of that noise.
    """

    video: Tensor
    level: Tensor


def build_generator(backbone: BackboneConfig, condition: ConditionConfig) -> "Generator":
    """The network with what reads its condition, freshly drawn."""
    return backbone.own_generator(condition) or Generator(backbone, condition)


class Generator(nn.Module):
    """Noisy video, noise level and condition to the network's answer F and its latents."""

    def __init__(self, backbone: BackboneConfig, condition: ConditionConfig) -> None:
        super().__init__()
        self.backbone_config, self.condition_config = backbone, condition
        self.embedder = ConditionEmbedder(condition, backbone.condition_dim)
        self.backbone: Backbone = backbone.build()
        self.level = nn.Linear(NUM_FEATURES, backbone.condition_dim) if self.is_upsampler else None

    @property
    def is_upsampler(self) -> bool:
        return self.backbone_config.is_upsampler

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
                empty; only for backbones that have latents.

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
        return self.backbone(x, tokens, mask, z_prev, keys, latents_only=latents_only)


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
