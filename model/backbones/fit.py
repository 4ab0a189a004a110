"""FIT backbone as Snap Video builds it (2402.14797, table 8): latents read patches, attend, write back.

    z <- z + XAttn(z, condition) + FF        1. latents read the condition tokens
    z <- z + XAttn(z, patches of group) + FF 2. ... and the patches of their own group
    z <- 4 x (self-attention + FF)           3. all latents together
    x <- x + XAttn(x, latents of group) + FF 4. patches of a group read its latents back

Six such blocks. Groups split space and span all frames; a patch never spans time. The sequence is
kept group by group from the first layer to the last, so that reading and writing are reshapes.

The authors' own FIT code ends on a stage without latents, which reads and writes nothing. Snap
Video has no such stage (its local layers number 0), so every one of its blocks must write: without
the sixth write the sixth block could not reach the output, nor be trained. With it the parameters
are the published ones.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbones.base import Backbone, BackboneConfig
from model.layers import (
    Attention,
    FeedForward,
    as_autocast,
    init_weights,
    number_dropouts,
    resample,
    run_block,
)


@dataclass(frozen=True)
class FitConfig(BackboneConfig):
    """Sizes of a FIT; the defaults are Snap Video's 500M (table 8).

    Attributes:
        patch_px: side of a patch; patches are one frame thick.
        group_height, group_width: target size of a group in patches; see `layout`.
        patch_dim, patch_head_dim: width of the patches, and of a head when latents meet patches.
        num_latents, latent_dim, latent_head_dim: the latents of all groups together; the number is
            rounded up to whole groups.
        num_blocks, layers_per_block: 6 blocks of 4 global layers.
        dropout: in the latents' feed-forwards.
        qk_norm: RMS-norm queries and keys (not in Snap Video).
        half_streams: under autocast the residual streams are 16-bit too, not float32.
    """

    patch_px: int = 4
    group_height: int = 5
    group_width: int = 4
    patch_dim: int = 768
    patch_head_dim: int = 48
    num_latents: int = 512
    latent_dim: int = 1024
    latent_head_dim: int = 64
    num_blocks: int = 6
    layers_per_block: int = 4
    dropout: float = 0.1
    qk_norm: bool = False
    half_streams: bool = False

    def build(self) -> "Fit":
        return Fit(self)

    def tokens(self) -> dict[str, int]:
        """Patches and latents of a video, together and in each group."""
        a = self.layout
        per_group = self.num_frames * a.patches_per_frame
        return {
            "patches": a.num_groups * per_group,
            "latents": a.num_latents,
            "groups": a.num_groups,
            "patches per group": per_group,
            "latents per group": a.latents_per_group,
        }

    @property
    def layout(self) -> "Layout":
        """The number of groups nearest to the target size, the frame padded to whole groups.

        The rule gives table 8: 36 x 64 pixels become 40 x 64 in 2 x 4 groups of 5 x 4 patches, and
        288 x 512 become 4 x 8 groups of 18 x 16. Latents are rounded up to the same number in each group.
        """
        high, wide = math.ceil(self.height_px / self.patch_px), math.ceil(self.width_px / self.patch_px)
        rows = max(1, round(high / self.group_height))
        columns = max(1, round(wide / self.group_width))
        return Layout(
            rows=rows,
            columns=columns,
            group_height=math.ceil(high / rows),
            group_width=math.ceil(wide / columns),
            patch_px=self.patch_px,
            latents_per_group=math.ceil(self.num_latents / (rows * columns)),
        )

    def layout_at(self, height_px: int, width_px: int) -> "Layout":
        """The same groups for a video of another size, smaller or larger: each keeps its latents."""
        a = self.layout
        if (height_px, width_px) == (self.height_px, self.width_px):
            return a
        high, wide = math.ceil(height_px / self.patch_px), math.ceil(width_px / self.patch_px)
        return replace(a, group_height=math.ceil(high / a.rows), group_width=math.ceil(wide / a.columns))


@dataclass(frozen=True)
class Layout:
    """How a frame is cut into groups of patches that share latents; sizes are in patches."""

    rows: int
    columns: int
    group_height: int
    group_width: int
    patch_px: int
    latents_per_group: int

    @property
    def height_px(self) -> int:
        """Of the padded frame."""
        return self.rows * self.group_height * self.patch_px

    @property
    def width_px(self) -> int:
        """Of the padded frame."""
        return self.columns * self.group_width * self.patch_px

    @property
    def num_groups(self) -> int:
        return self.rows * self.columns

    @property
    def num_latents(self) -> int:
        return self.num_groups * self.latents_per_group

    @property
    def patches_per_frame(self) -> int:
        """In each group."""
        return self.group_height * self.group_width


class FitBlock(nn.Module):
    """Read the condition, read the patches by group, think globally, write back."""

    def __init__(self, config: FitConfig) -> None:
        super().__init__()
        x, z, c = config.patch_dim, config.latent_dim, config.condition_dim
        meet, head = min(x, z), config.patch_head_dim
        self.read_condition = Attention(
            z, width=min(c, z), head_dim=head, context_dim=c, qk_norm=config.qk_norm
        )
        self.read_condition_ff = FeedForward(z, dropout=config.dropout)
        self.read = Attention(z, width=meet, head_dim=head, context_dim=x, qk_norm=config.qk_norm)
        self.read_ff = FeedForward(z, dropout=config.dropout)
        self.think = nn.ModuleList(
            Attention(z, width=z, head_dim=config.latent_head_dim, qk_norm=config.qk_norm)
            for _ in range(config.layers_per_block)
        )
        self.think_ff = nn.ModuleList(
            FeedForward(z, dropout=config.dropout) for _ in range(config.layers_per_block)
        )
        self.write = Attention(x, width=meet, head_dim=head, context_dim=z, qk_norm=config.qk_norm)
        self.write_ff = FeedForward(x)

    def forward(
        self, x: Tensor, z: Tensor, tokens: Tensor, mask: Tensor, keys: Tensor | None, write: bool = True
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            x: `b g n patch_dim` patches by group.
            z: `b (g m) latent_dim` latents, group by group.
            tokens: `b k condition_dim` condition tokens.
            mask: `b 1 1 k` bool, True where a condition token may be read.
            keys: `b` int64 dropout keys, or None for no dropout.
            write: False leaves step 4 out, where nobody reads the patches any more.
        """
        b, g = x.shape[:2]
        z = z + self.read_condition(z, tokens, mask)
        z = z + self.read_condition_ff(z, keys)
        groups, patches = z.view(b * g, -1, z.shape[-1]), x.flatten(0, 1)
        z = z + self.read(groups, patches).view_as(z)
        z = z + self.read_ff(z, keys)
        for attention, feed_forward in zip(self.think, self.think_ff, strict=True):
            z = z + attention(z)
            z = z + feed_forward(z, keys)
        if not write:
            return x, z
        x = x + self.write(patches, z.view(b * g, -1, z.shape[-1])).view_as(x)
        return x + self.write_ff(x), z


class Fit(Backbone):
    """The backbone: noisy video and condition tokens to the network's answer and its latents."""

    def __init__(self, config: FitConfig) -> None:
        super().__init__()
        self.config, self.layout = config, config.layout
        x, z, p = config.patch_dim, config.latent_dim, config.patch_px
        self.embed = nn.Linear(config.in_channels * p * p, x)
        self.time = nn.Parameter(torch.empty(config.num_frames, x))
        self.row = nn.Parameter(torch.empty(self.layout.height_px // p, x))
        self.column = nn.Parameter(torch.empty(self.layout.width_px // p, x))
        self.latents = nn.Parameter(torch.empty(self.layout.num_latents, z))
        self.self_condition = SelfCondition(z)
        self.blocks = nn.ModuleList(FitBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(x, eps=1e-6)
        self.head = nn.Linear(x, config.out_channels * p * p)
        number_dropouts(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights; the head starts at zero, so the first answer is zero."""
        init_weights(self, depth=self.config.num_blocks * (self.config.layers_per_block + 3))
        for table in (self.time, self.row, self.column, self.latents):
            # as loud as the patches: at high noise the place is all that a patch knows of itself
            nn.init.trunc_normal_(table, std=0.5)
        nn.init.zeros_(self.head.weight)

    @property
    def z_shape(self) -> tuple[int, int]:
        """Shape of one sample's latents, `(g m) latent_dim`."""
        return self.layout.num_latents, self.config.latent_dim

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        mask: Tensor,
        z_prev: Tensor | None = None,
        keys: Tensor | None = None,
        *,
        latents_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As `Backbone.forward`; `latents_only` leaves out what only the answer needs."""
        num_frames, (height, width) = x.shape[1], x.shape[-2:]
        a = self.config.layout_at(height, width)
        patches = self.embed(self._cut(x, a)) + self._places(a, num_frames, height, width)
        z = self.latents.repeat(x.shape[0], 1, 1)
        if z_prev is not None:
            z = z + self.self_condition(z_prev)
        if self.config.half_streams:
            patches, z = as_autocast(patches), as_autocast(z)
        mask = mask[:, None, None, :]
        for number, block in enumerate(self.blocks):
            write = not latents_only or number < len(self.blocks) - 1
            recompute = self.config.checkpoint
            patches, z = run_block(block, patches, z, tokens, mask, keys, write, recompute=recompute)
        if latents_only:
            return x.new_zeros(0), z
        return self._join(self.head(self.norm(patches)), a, num_frames, height, width), z

    def _places(self, a: Layout, num_frames: int, height: int, width: int) -> Tensor:
        """`g (t gh gw) d` learned positions, one table an axis, so that the upsampler keeps its size."""
        rows, columns = self.row, self.column
        if a != self.layout:
            patch, config = self.config.patch_px, self.config
            down = math.ceil(config.height_px / patch) / math.ceil(height / patch)
            across = math.ceil(config.width_px / patch) / math.ceil(width / patch)
            rows = resample(rows, a.rows * a.group_height, down)
            columns = resample(columns, a.columns * a.group_width, across)
        time = self.time[:num_frames].view(1, 1, num_frames, 1, 1, -1)
        row = rows.view(a.rows, 1, 1, a.group_height, 1, -1)
        column = columns.view(1, a.columns, 1, 1, a.group_width, -1)
        return (time + row + column).flatten(2, 4).flatten(0, 1)

    def _cut(self, x: Tensor, a: Layout) -> Tensor:
        """`b t c h w` to `b g (t gh gw) (c p p)`: pad to whole groups, then cut group by group."""
        b, t, c, h, w = x.shape
        if t > self.config.num_frames:
            raise ValueError(f"video of {t} frames; this model takes up to {self.config.num_frames}")
        p = self.config.patch_px
        if (a.height_px, a.width_px) != (h, w):
            x = F.pad(x, (0, a.width_px - w, 0, a.height_px - h))
        x = x.reshape(b, t, c, a.rows, a.group_height, p, a.columns, a.group_width, p)
        return x.permute(0, 3, 6, 1, 4, 7, 2, 5, 8).reshape(b, a.num_groups, t * a.patches_per_frame, c * p * p)

    def _join(self, patches: Tensor, a: Layout, num_frames: int, height: int, width: int) -> Tensor:
        """`b g (t gh gw) (c p p)` back to `b t c h w`, the padding cut away."""
        p, c = self.config.patch_px, self.config.out_channels
        x = patches.view(-1, a.rows, a.columns, num_frames, a.group_height, a.group_width, c, p, p).permute(
            0, 3, 6, 1, 4, 7, 2, 5, 8
        )
        return x.reshape(-1, num_frames, c, a.height_px, a.width_px)[..., :height, :width]


class SelfCondition(nn.Module):
    """LN_{gain=0}(MLP(z_prev)): what the latents knew, switched off at first (FIT, RIN).

    No biases, so that zeros in are zeros out: a sample without an earlier answer gives none.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim, bias=False)
        nn.init.zeros_(self.norm.weight)

    def forward(self, z_prev: Tensor) -> Tensor:
        return self.norm(self.down(F.gelu(self.up(z_prev), approximate="tanh")))
