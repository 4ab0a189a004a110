"""What a generator costs to evaluate and to train, in FLOPs by part, from closed forms.

Two FLOPs per multiply-add of matrix products and of attention; elementwise work is not counted.
torch's FlopCounterMode counts the same, and a test holds the two equal.
"""

from dataclasses import dataclass

import torch

from model.condition import NUM_FEATURES, NUM_SCALARS, ConditionConfig
from model.dit import DitConfig
from model.fit_layout import FitConfig, layout_at
from model.generator import BackboneConfig, Generator


def linear(rows: int, inputs: int, outputs: int) -> int:
    """FLOPs of a matrix product."""
    return 2 * rows * inputs * outputs


def attention(queries: int, keys: int, width: int) -> int:
    """FLOPs of q k^T and of the weighted sum of v, all heads together."""
    return 4 * queries * keys * width


def feed_forward(rows: int, dim: int) -> int:
    """FLOPs of `dim -> 4 dim -> dim`."""
    return 2 * linear(rows, dim, 4 * dim)


@dataclass(frozen=True)
class Sizes:
    """Lengths that the costs depend on: patches, latents and condition tokens of one sample."""

    patches: int
    latents: int
    tokens: int


def sizes(
    backbone: BackboneConfig,
    condition: ConditionConfig,
    *,
    prompt_tokens: int,
    num_frames: int | None = None,
    size_px: tuple[int, int] | None = None,
    num_references: int = 0,
    reference_px: int = 64,
) -> Sizes:
    """Token counts of one sample; `num_frames` and `size_px` (height, width) default to the backbone's own."""
    frames = num_frames or backbone.num_frames
    height, width = size_px or (backbone.height_px, backbone.width_px)
    if isinstance(backbone, FitConfig):
        a = layout_at(backbone, height, width)
        patches, latents = frames * a.num_groups * a.patches_per_frame, a.num_latents
    else:
        p = backbone.patch_px
        patches, latents = frames * -(-height // p) * -(-width // p), 0
    per_reference = (reference_px // condition.reference_patch_px) ** 2
    references = num_references * per_reference if condition.mode == "plus" else 0
    level = backbone.in_channels > backbone.out_channels
    return Sizes(patches, latents, NUM_SCALARS + prompt_tokens + references + level)


def forward_flops(
    backbone: BackboneConfig,
    condition: ConditionConfig,
    n: Sizes,
    *,
    self_conditioned: bool = True,
    prompt_tokens: int,
) -> dict[str, int]:
    """FLOPs of one forward pass of one sample, by part."""
    parts = {"condition embedder": _embedder(backbone, condition, n, prompt_tokens)}
    if isinstance(backbone, FitConfig):
        return parts | _fit(backbone, n, self_conditioned)
    return parts | _dit(backbone, n)


def _embedder(backbone: BackboneConfig, condition: ConditionConfig, n: Sizes, prompt_tokens: int) -> int:
    c = backbone.condition_dim
    scalars = 4 * linear(1, NUM_FEATURES, c)  # sigma, frame rate, height and width
    total = scalars + linear(prompt_tokens, condition.token_dim, c)
    level = backbone.in_channels > backbone.out_channels
    references = n.tokens - NUM_SCALARS - prompt_tokens - level
    if references:
        inputs = condition.reference_channels * condition.reference_patch_px**2
        total += linear(references, inputs, c)
        # The places of one picture are embedded once, and shared by the batch.
    return total + (linear(1, NUM_FEATURES, c) if level else 0)


def _fit(config: FitConfig, n: Sizes, self_conditioned: bool) -> dict[str, int]:
    x, z, c, p = config.patch_dim, config.latent_dim, config.condition_dim, config.patch_px**2
    meet, groups, blocks = min(x, z), config.layout.num_groups, config.num_blocks
    wide = min(c, z)
    per_group = attention(n.latents // groups, n.patches // groups, meet) * groups
    condition = 2 * linear(n.latents, z, wide) + linear(n.tokens, c, 2 * wide)
    condition += attention(n.latents, n.tokens, wide)
    read = 2 * linear(n.latents, z, meet) + linear(n.patches, x, 2 * meet) + per_group
    write = 2 * linear(n.patches, x, meet) + linear(n.latents, z, 2 * meet) + per_group
    think = linear(n.latents, z, 4 * z) + attention(n.latents, n.latents, z)
    layers = blocks * config.layers_per_block
    return {
        "patches in and out": linear(n.patches, (config.in_channels + config.out_channels) * p, x),
        "latent self-conditioning": feed_forward(n.latents, z) if self_conditioned else 0,
        "read condition": blocks * condition,
        "read condition feed-forward": blocks * feed_forward(n.latents, z),
        "read patches": blocks * read,
        "read patches feed-forward": blocks * feed_forward(n.latents, z),
        "global attention": layers * think,
        "global feed-forward": layers * feed_forward(n.latents, z),
        "write patches": blocks * write,
        "write patches feed-forward": blocks * feed_forward(n.patches, x),
    }


def _dit(config: DitConfig, n: Sizes) -> dict[str, int]:
    d, c, p = config.dim, config.condition_dim, config.patch_px**2
    own = linear(n.patches, d, 4 * d) + attention(n.patches, n.patches, d)
    cross = 2 * linear(n.patches, d, d) + linear(n.tokens, c, 2 * d)
    cross += attention(n.patches, n.tokens, d)
    return {
        "patches in and out": linear(n.patches, (config.in_channels + config.out_channels) * p, d),
        "modulation": linear(1, c, d) + linear(1, d, 6 * d),
        "self-attention": config.num_blocks * own,
        "read condition": config.num_blocks * cross,
        "feed-forward": config.num_blocks * feed_forward(n.patches, d),
    }


def count_parameters(backbone: BackboneConfig, condition: ConditionConfig) -> dict[str, int]:
    """Parameters of the embedder, the backbone and both, from a model without memory."""
    with torch.device("meta"):
        model = Generator(backbone, condition)
    total = sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for p in model.backbone.parameters())
    return {"condition embedder": total - inner, "backbone": inner, "total": total}


def training_flops(
    backbone: BackboneConfig,
    condition: ConditionConfig,
    n: Sizes,
    *,
    prompt_tokens: int,
    self_condition_rate: float = 0.9,
) -> dict[str, int]:
    """FLOPs of one training step of one sample, without recomputation.

    The backward pass costs twice the forward pass, less the gradients of inputs that nobody trains:
    the noisy video, the encoder's tokens, the scalars, and the latents of the first pass. That
    first pass runs for the whole batch if its rate is not zero, and ends with the latents: it writes no
    patches in the last block, and nothing out.
    """
    has_latents = n.latents > 0 and self_condition_rate > 0
    parts = forward_flops(backbone, condition, n, self_conditioned=has_latents, prompt_tokens=prompt_tokens)
    forward = sum(parts.values())
    width = backbone.patch_dim if isinstance(backbone, FitConfig) else backbone.dim
    untrained = parts["condition embedder"]
    untrained += linear(n.patches, backbone.in_channels * backbone.patch_px**2, width)
    first = 0
    if has_latents and isinstance(backbone, FitConfig):
        untrained += linear(n.latents, backbone.latent_dim, 4 * backbone.latent_dim)
        unwritten = parts["write patches"] + parts["write patches feed-forward"]
        out = linear(n.patches, width, backbone.out_channels * backbone.patch_px**2)
        first = forward - parts["latent self-conditioning"] - unwritten // backbone.num_blocks - out
    return {"first pass": first, "forward": forward, "backward": 2 * forward - untrained}
