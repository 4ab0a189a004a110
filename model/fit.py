"""FIT as Snap Video builds it (2402.14797, table 8): few latents think, many patches listen.

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

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.fit_layout import FitConfig, Layout, layout_at
from model.layers import Attention, FeedForward, as_autocast, init_weights, number_dropouts, resample


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


class Fit(nn.Module):
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
    ) -> tuple[Tensor, Tensor]:
        """One evaluation.

        Args:
            x: `b t c h w` scaled noisy video, t up to `num_frames`; h and w are the config's, or those of
                another bucket (`layout_at`).
            tokens: `b k condition_dim` condition tokens.
            mask: `b k` bool, True where the token is real.
            z_prev: `b (g m) latent_dim` latents of an earlier evaluation; None equals zeros.
            keys: `b` int64 dropout keys; None switches dropout off.

        Returns:
            `b t out_channels h w` answer F, and the latents after the last block.
        """
        a = layout_at(self.config, x.shape[-2], x.shape[-1])
        patches, z = self._run(x, a, tokens, mask, z_prev, keys, write_last=True)
        return self._join(self.head(self.norm(patches)), a, x.shape[1], x.shape[-2], x.shape[-1]), z

    def think(self, x: Tensor, tokens: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """`b (g m) latent_dim` latents alone: `forward` without what only its answer needs."""
        a = layout_at(self.config, x.shape[-2], x.shape[-1])
        return self._run(x, a, tokens, mask, None, keys, write_last=False)[1]

    def _run(
        self,
        x: Tensor,
        a: Layout,
        tokens: Tensor,
        mask: Tensor,
        z_prev: Tensor | None,
        keys: Tensor | None,
        *,
        write_last: bool,
    ) -> tuple[Tensor, Tensor]:
        """Patches and latents after the last block."""
        patches = self.embed(self._cut(x, a)) + self._places(a, x.shape[1], x.shape[-2], x.shape[-1])
        z = self.latents.repeat(x.shape[0], 1, 1)
        if z_prev is not None:
            z = z + self.self_condition(z_prev)
        if self.config.half_streams:
            patches, z = as_autocast(patches), as_autocast(z)
        mask = mask[:, None, None, :]
        for number, block in enumerate(self.blocks):
            write = write_last or number < len(self.blocks) - 1
            if self.config.checkpoint and torch.is_grad_enabled():
                patches, z = checkpoint(
                    block, patches, z, tokens, mask, keys, write,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                patches, z = block(patches, z, tokens, mask, keys, write)
        return patches, z

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
            x = self._pad(x, a)
        x = x.reshape(b, t, c, a.rows, a.group_height, p, a.columns, a.group_width, p)
        return x.permute(0, 3, 6, 1, 4, 7, 2, 5, 8).reshape(b, a.num_groups, t * a.patches_per_frame, c * p * p)

    def _pad(self, x: Tensor, a: Layout) -> Tensor:
        amount = (0, a.width_px - x.shape[-1], 0, a.height_px - x.shape[-2])
        mode = "replicate" if self.config.padding == "edge" else "constant"
        return F.pad(x.flatten(0, 1), amount, mode).unflatten(0, x.shape[:2])

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
