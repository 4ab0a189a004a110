"""Video DiT with adaLN-Zero, of the same interface as FIT: the baseline.

Every patch attends to every patch of every frame, reads the condition tokens by cross-attention
(PixArt, 2310.00426) and is modulated by sigma, frame rate and size through adaLN-zero with one
shared projection (DiT, 2212.09748; PixArt's adaLN-single).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbones.base import Backbone, BackboneConfig
from model.condition import NUM_SCALARS
from model.layers import Attention, FeedForward, as_autocast, init_weights, resample, run_block


@dataclass(frozen=True)
class DitConfig(BackboneConfig):
    """Sizes of a DiT.

    Attributes:
        patch_px: side of a patch; patches are one frame thick, as FIT's.
        dim, head_dim: width of the patches and of a head.
        num_blocks: transformer blocks.
        qk_norm: RMS-norm queries and keys.
        half_streams: under autocast the residual stream is 16-bit too, not float32.
        pixel_dim: width of the convolutions that work the answer out pixel by pixel; 0 is the plain DiT.
    """

    patch_px: int = 4
    dim: int = 1152
    head_dim: int = 72
    num_blocks: int = 28
    qk_norm: bool = False
    half_streams: bool = False
    pixel_dim: int = 0

    def build(self) -> "Dit":
        return Dit(self)

    def tokens(self) -> dict[str, int]:
        """Patches of a video."""
        rows, columns = self.grid(self.height_px, self.width_px)
        return {"patches": self.num_frames * rows * columns}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of a frame."""
        return math.ceil(height / self.patch_px), math.ceil(width / self.patch_px)


class DitBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; scaled, shifted and gated by the noise level."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        d, head = config.dim, config.head_dim
        self.attention = Attention(d, width=d, head_dim=head, qk_norm=config.qk_norm)
        self.cross = Attention(
            d, width=d, head_dim=head, context_dim=config.condition_dim, qk_norm=config.qk_norm
        )
        self.feed_forward = FeedForward(d)
        self.table = nn.Parameter(torch.zeros(6, d))

    def forward(self, x: Tensor, modulation: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """`b n d` patches, `b 6 d` modulation shared by all blocks, `b k c` tokens, `b 1 1 k` mask."""
        m = modulation + self.table
        x = x + m[:, 2:3] * self.attention(x, modulation=m[:, 0:2])
        x = x + self.cross(x, tokens, mask)
        return x + m[:, 5:6] * self.feed_forward(x, modulation=m[:, 3:5])


class PixelHead(nn.Module):
    """Convolutions over the noisy pixels and what the patches say of each: the answer's fine part.

    A linear head has to carry a patch's noise through the width of the network, which leaves a narrow one with
    noise all over its videos; neighbouring pixels tell noise from edges at once. In 100 s of a core the squared
    error falls from .0086 to .0058 at sigma .3 and from .0289 to .0195 at 1 (tests/bench/bench_world.py).
    """

    FEATURES = 8
    """Channels a pixel that the patches hand on. Ours."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        wide = config.pixel_dim
        self.modulate = nn.Linear(config.dim, 2 * wide)
        self.enter = nn.Conv2d(config.in_channels + self.FEATURES, wide, 3, padding=1)
        self.inner = nn.Conv2d(wide, wide, 3, padding=1)
        self.outer = nn.Conv2d(wide, wide, 3, padding=1)
        self.answer = nn.Conv2d(wide, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, features: Tensor, scalars: Tensor) -> Tensor:
        """`b t c h w` noisy pixels, `b t f h w` features, `b d` noise level and sizes to `b t c h w`."""
        batch, frames = x.shape[:2]
        pixels = torch.cat([x, features], dim=2).flatten(0, 1)
        # On CPUs convolutions of `b c h w` want channels in eights, and SiLU's exponential costs less than the
        # tanh of GELU: together a third of the head's time.
        pixels = self.enter(pixels.contiguous(memory_format=torch.channels_last))
        modulation = self.modulate(scalars).repeat_interleave(frames, dim=0)
        scale, shift = modulation[..., None, None].chunk(2, dim=1)
        inner = self.inner(F.silu(pixels * (1 + scale) + shift))
        pixels = pixels + self.outer(F.silu(inner))
        return self.answer(F.silu(pixels)).contiguous().unflatten(0, (batch, frames))


class Dit(Backbone):
    """The backbone, without latents and dropout."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        d, p = config.dim, config.patch_px
        self.rows, self.columns = config.grid(config.height_px, config.width_px)
        self.embed = nn.Linear(config.in_channels * p * p, d)
        self.time = nn.Parameter(torch.empty(config.num_frames, d))
        self.row = nn.Parameter(torch.empty(self.rows, d))
        self.column = nn.Parameter(torch.empty(self.columns, d))
        self.pool = nn.Linear(config.condition_dim, d)
        self.modulate = nn.Linear(d, 6 * d)
        self.blocks = nn.ModuleList(DitBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, config.out_channels * p * p)
        if config.pixel_dim:
            self.features = nn.Linear(d, PixelHead.FEATURES * p * p)
            self.pixels = PixelHead(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights; gates and head start at zero (adaLN-zero)."""
        init_weights(self, depth=self.config.num_blocks)
        for table in (self.time, self.row, self.column):
            # As loud as the patches, as in FIT. In 100 s of a core (tests/bench/bench_world.py) a DiT of 0.35M
            # that starts at 0.02 moves a quarter of the things as told, a guess; one at 0.5 nearly all.
            nn.init.trunc_normal_(table, std=0.5)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.head.weight)
        if self.config.pixel_dim:
            nn.init.zeros_(self.pixels.modulate.weight)
            nn.init.zeros_(self.pixels.answer.weight)

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
        """As `Backbone.forward`; `z_prev` is ignored and no latents come back."""
        t, (height, width) = x.shape[1], x.shape[-2:]
        patches = self.embed(self._cut(x)) + self._places(t, height, width)
        if self.config.half_streams:
            patches = as_autocast(patches)
        scalars = F.silu(self.pool(tokens[:, :NUM_SCALARS].mean(dim=1)))
        modulation = self.modulate(scalars).unflatten(-1, (6, -1))
        mask = mask[:, None, None, :]
        for block in self.blocks:
            recompute = self.config.checkpoint
            patches = run_block(block, patches, modulation, tokens, mask, recompute=recompute)
        empty = patches.new_zeros(x.shape[0], *self.z_shape)
        patches = self.norm(patches)
        answer = self._join(self.head(patches), t, height, width)
        if self.config.pixel_dim:
            features = self._join(self.features(patches), t, height, width)
            answer = answer + self.pixels(x, features, scalars)
        return answer, empty

    def _places(self, num_frames: int, height: int, width: int) -> Tensor:
        rows, columns = self.config.grid(height, width)
        row, column = self.row, self.column
        if (rows, columns) != (self.rows, self.columns):
            row = resample(row, rows, self.rows / rows)
            column = resample(column, columns, self.columns / columns)
        time = self.time[:num_frames, None, None]
        return (time + row[:, None] + column).flatten(0, 2)

    def _cut(self, x: Tensor) -> Tensor:
        """`b t c h w` to `b (t rows columns) (c p p)`."""
        b, t, c, h, w = x.shape
        if t > self.config.num_frames:
            raise ValueError(f"video of {t} frames; this model takes up to {self.config.num_frames}")
        p, (rows, columns) = self.config.patch_px, self.config.grid(h, w)
        x = F.pad(x, (0, columns * p - w, 0, rows * p - h))
        x = x.view(b, t, c, rows, p, columns, p).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(b, t * rows * columns, c * p * p)

    def _join(self, patches: Tensor, num_frames: int, height: int, width: int) -> Tensor:
        p, (rows, columns) = self.config.patch_px, self.config.grid(height, width)
        x = patches.view(-1, num_frames, rows, columns, patches.shape[-1] // p**2, p, p)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, num_frames, x.shape[4], rows * p, columns * p)
        return x[..., :height, :width]
