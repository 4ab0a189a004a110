"""The sizes of a FIT, and how a frame is cut into groups of patches that share latents."""

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class FitConfig:
    """Sizes of a FIT; the defaults are Snap Video's 500M (table 8).

    Attributes:
        num_frames, height_px, width_px: of the video (or of its latents); smaller clips in time fit, and
            other sizes at the price of padding (`layout_at`).
        in_channels, out_channels: 3 for pixels; the upsampler's input also carries the small video.
        patch_px: side of a patch; patches are one frame thick.
        group_height, group_width: target size of a group in patches; see `groups`.
        patch_dim, patch_head_dim: width of the patches, and of a head when latents meet patches.
        num_latents, latent_dim, latent_head_dim: the latents of all groups together; the number is
            rounded up to whole groups.
        condition_dim: width of the condition tokens ("cond. channels").
        num_blocks, layers_per_block: 6 blocks of 4 global layers.
        dropout: in the latents' feed-forwards.
        padding: what fills the frame up to whole groups: black-grey zeros, or copies of the edge.
        checkpoint: recompute each block in the backward pass.
        qk_norm: RMS-norm queries and keys (not in Snap Video).
        half_streams: under autocast the residual streams are 16-bit too, not float32.
    """

    num_frames: int = 16
    height_px: int = 36
    width_px: int = 64
    in_channels: int = 3
    out_channels: int = 3
    patch_px: int = 4
    group_height: int = 5
    group_width: int = 4
    patch_dim: int = 768
    patch_head_dim: int = 48
    num_latents: int = 512
    latent_dim: int = 1024
    latent_head_dim: int = 64
    condition_dim: int = 768
    num_blocks: int = 6
    layers_per_block: int = 4
    dropout: float = 0.1
    padding: Literal["zeros", "edge"] = "zeros"
    checkpoint: bool = False
    qk_norm: bool = False
    half_streams: bool = False

    @property
    def layout(self) -> "Layout":
        return layout(self)


@dataclass(frozen=True)
class Layout:
    """How a frame is cut: numbers of groups, patches per group, and the padded size in pixels."""

    rows: int
    columns: int
    group_height: int
    group_width: int
    height_px: int
    width_px: int
    latents_per_group: int

    @property
    def num_groups(self) -> int:
        return self.rows * self.columns

    @property
    def num_latents(self) -> int:
        return self.num_groups * self.latents_per_group

    @property
    def patches_per_frame(self) -> int:
        return self.group_height * self.group_width


def layout(config: FitConfig) -> Layout:
    """Choose the number of groups nearest to the target size, then pad to whole groups.

    The rule gives table 8: 36 x 64 pixels become 40 x 64 in 2 x 4 groups of 5 x 4 patches, and
    288 x 512 become 4 x 8 groups of 18 x 16. Latents are rounded up to the same number in each group.
    """
    patch = config.patch_px
    high, wide = math.ceil(config.height_px / patch), math.ceil(config.width_px / patch)
    rows = max(1, round(high / config.group_height))
    columns = max(1, round(wide / config.group_width))
    group_height, group_width = math.ceil(high / rows), math.ceil(wide / columns)
    return Layout(
        rows=rows,
        columns=columns,
        group_height=group_height,
        group_width=group_width,
        height_px=rows * group_height * patch,
        width_px=columns * group_width * patch,
        latents_per_group=math.ceil(config.num_latents / (rows * columns)),
    )


def layout_at(config: FitConfig, height_px: int, width_px: int) -> Layout:
    """The same groups for a video of another size: smaller or larger ones, so that each keeps its latents."""
    a, patch = config.layout, config.patch_px
    if (height_px, width_px) == (config.height_px, config.width_px):
        return a
    group_height = math.ceil(math.ceil(height_px / patch) / a.rows)
    group_width = math.ceil(math.ceil(width_px / patch) / a.columns)
    return replace(
        a,
        group_height=group_height,
        group_width=group_width,
        height_px=a.rows * group_height * patch,
        width_px=a.columns * group_width * patch,
    )
