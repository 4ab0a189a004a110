"""Pre-normed attention and feed-forward layers, of which every backbone is made.

No mask tricks, no graph breaks: `torch.compile` takes each block whole, and SDPA picks the flash or
the memory-efficient kernel. No biases beside those of the norms. Dropout is a function of (sample
key, layer, place), not of a global random state, so a sample meets the same dropout in any batch,
on any rank, and when it is recomputed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Multi-head attention of `b n dim` on itself, or on a context of another width.

    Returns the update; the caller adds it. Queries and context are layer-normed first.

    Args:
        dim: width of the queries and of the answer.
        width: width inside, `num_heads * head_dim`.
        head_dim: width of one head.
        context_dim: width of the context; None attends to the queries' own sequence.
        qk_norm: RMS-norm the queries and keys of each head (2302.05442): larger learning rates stay stable.
    """

    def __init__(
        self, dim: int, *, width: int, head_dim: int, context_dim: int | None = None, qk_norm: bool = False
    ) -> None:
        super().__init__()
        if width % head_dim:
            raise ValueError(f"width {width} is not a multiple of head_dim {head_dim}")
        self.num_heads, self.head_dim = width // head_dim, head_dim
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.norm_context = None if context_dim is None else nn.LayerNorm(context_dim, eps=1e-6)
        self.to_q = nn.Linear(dim, width, bias=False)
        self.to_kv = nn.Linear(context_dim or dim, 2 * width, bias=False)
        self.to_out = nn.Linear(width, dim, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """The update `b n dim`.

        Args:
            x: `b n dim` queries.
            context: `b k context_dim`, if this layer reads one.
            mask: `b 1 1 k` bool, True where the context may be read.
            modulation: `b 2 dim` scale and shift of the normed queries (adaLN).
        """
        x = modulated(self.norm(x), modulation)
        context = x if self.norm_context is None or context is None else self.norm_context(context)
        q = self._heads(self.to_q(x))
        k, v = (self._heads(part) for part in self.to_kv(context).chunk(2, dim=-1))
        if self.norm_q is not None and self.norm_k is not None:
            q, k = unit_scale(self.norm_q, q), unit_scale(self.norm_k, k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """Pre-normed `dim -> 4 dim -> dim`; returns the update, with per-sample dropout on it."""

    layer: Tensor

    def __init__(self, dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        # A tensor, since torch.compile would take a plain number for a constant and each block for another.
        self.register_buffer("layer", layer_seed(0), persistent=False)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, keys: Tensor | None = None, modulation: Tensor | None = None) -> Tensor:
        """`b n dim` to `b n dim`; dropout only where sample `keys` (`b` int64) are given."""
        x = modulated(self.norm(x), modulation)
        out = self.down(F.gelu(self.up(x), approximate="tanh"))
        if keys is None or self.dropout == 0:
            return out
        return out * dropout_scale(keys, self.layer, out.shape, self.dropout).to(out.dtype)


def unit_scale(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm in x's own type: torch has one kernel for it only where the weight is of that type too."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def modulated(x: Tensor, modulation: Tensor | None) -> Tensor:
    """`b n d` times (1 + scale) plus shift, from `b 2 d`; unchanged without."""
    if modulation is None:
        return x
    scale, shift = modulation.unsqueeze(2).unbind(1)
    return x * (1 + scale) + shift


def as_autocast(x: Tensor) -> Tensor:
    """The tensor in autocast's type; as it is where there is no autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def run_block(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """The block's answer; with `recompute` its insides are computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def dropout_scale(keys: Tensor, layer: Tensor, shape: torch.Size, rate: float) -> Tensor:
    """0 with probability `rate`, else 1 / (1 - rate): a hash of (key, layer, place) in 32-bit steps.

    Args:
        keys: `b` int64, one per sample.
        layer: `layer_seed` of the layer, so that layers drop different places.
        shape: `b ...` of the activations.
        rate: in [0, 1).
    """
    size = shape[1:].numel()
    seeds = _mix((keys & 0x7FFFFFFF).to(torch.int32) ^ layer)
    # Multiplying the places first would be folded into Triton's index arithmetic, and overflow there.
    places = torch.arange(size, dtype=torch.int32, device=keys.device)
    bits = _mix(seeds[:, None] ^ places) & 0xFFFFFF
    return (bits >= int(rate * (1 << 24))).view(shape) * (1.0 / (1.0 - rate))


def number_dropouts(model: nn.Module) -> None:
    """Give each feed-forward its own layer number; called once by each backbone."""
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, FeedForward)):
        layer.layer = layer_seed(i)


def init_weights(model: nn.Module, depth: int) -> None:
    """Truncated normal of 1 / sqrt(fan in), so that any width keeps its scale; branch ends shrink.

    Snap Video prints no initialisation. GPT-2's 0.02 for every width left a narrow network slow to use its
    condition: `fit-tiny` on 23 clips, 300 steps, squared error at sigma 10: 0.24, and 0.18 with this rule.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            std = module.weight[0].numel() ** -0.5
            if name.endswith(("to_out", "down")):
                std *= depth**-0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _mix(h: Tensor) -> Tensor:
    """Murmur3's finaliser on int32 (shifts masked, because int32 shifts keep the sign)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387
    return h ^ ((h >> 16) & 0xFFFF)


def layer_seed(number: int) -> Tensor:
    """int32 scalar that stands for layer `number` (from 0) in the hash of its dropout."""
    return torch.tensor(((number + 1) * 2654435761) & 0x7FFFFFFF, dtype=torch.int32)


def resample(table: Tensor, count: int, step: float) -> Tensor:
    """`n d` learned positions of an axis at `count` other places, `step` old patches apart: `count d`.

    Places are centres of patches, so the picture's borders stay where they are; beyond the table its last
    entry goes on.
    """
    places = ((torch.arange(count, device=table.device) + 0.5) * step - 0.5).clamp(0, len(table) - 1)
    low = places.long()
    share = (places - low)[:, None].to(table.dtype)
    return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], share)
