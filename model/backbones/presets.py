"""Backbone presets by name: the published sizes, and small ones for laptops and tests."""

from dataclasses import replace
from typing import Any

from model.backbones.base import BackboneConfig
from model.backbones.dit import DitConfig
from model.backbones.fit import FitConfig
from model.registry import named

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

    `package.module:CONFIG` is a user's own: any `BackboneConfig` that can be imported.

    Raises:
        ValueError: no such preset, or no such field.
    """
    config = named(PRESETS, name)
    try:
        return replace(config, **changes)
    except TypeError as error:
        raise ValueError(f"preset {name!r}: {error}") from None
