"""Activation memory: what autograd keeps between forward and backward, tensor by tensor.

Counted, not measured; a test holds it within 10 % of the allocator's peak. Attention is assumed to
be fused (flash or memory-efficient), so that no map of queries by keys is ever stored.
"""

from dataclasses import dataclass

from model.cost.flops import Sizes
from model.dit import DitConfig
from model.fit_layout import FitConfig
from model.generator import BackboneConfig


@dataclass(frozen=True)
class Kept:
    """Numbers of one sample that autograd keeps: of the residual streams, and of everything else.

    Under autocast the streams stay in float32 (unless `half_streams`) while the rest is in half precision.
    """

    stream: int = 0
    inner: int = 0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.stream + other.stream, self.inner + other.inner)

    def __rmul__(self, count: int) -> "Kept":
        return Kept(count * self.stream, count * self.inner)

    def bytes(self, *, stream: int, inner: int) -> int:
        return self.stream * stream + self.inner * inner


def kept_activations(backbone: BackboneConfig, n: Sizes, *, checkpoint: bool) -> Kept:
    """What is kept between forward and backward.

    Without recomputation every block keeps its tensors; with it each block keeps its inputs, and
    one block at a time is recomputed.
    """
    whole = _fit_kept(backbone, n) if isinstance(backbone, FitConfig) else _dit_kept(backbone, n)
    block, inputs, rest = whole
    if checkpoint:
        return backbone.num_blocks * inputs + block + rest
    return backbone.num_blocks * block + rest


def _attention_kept(
    queries: int, keys: int, dim: int, width: int, context: int = 0, *, qk_norm: bool = False
) -> Kept:
    """Input; normed input and context, q, k, v and the heads' answer; normed q and k."""
    normed = 2 * (queries + keys) * width if qk_norm else 0  # with the gain and without
    return Kept(queries * dim, queries * (dim + 2 * width) + keys * (2 * width + context) + normed)


def _feed_forward_kept(rows: int, dim: int) -> Kept:
    """Input; normed input, and the hidden layer before and after the activation."""
    return Kept(rows * dim, rows * 9 * dim)


def _fit_kept(config: FitConfig, n: Sizes) -> tuple[Kept, Kept, Kept]:
    x, z, c = config.patch_dim, config.latent_dim, config.condition_dim
    meet, wide, norm = min(x, z), min(c, z), config.qk_norm
    block = (
        _attention_kept(n.latents, n.tokens, z, wide, c, qk_norm=norm)
        + _attention_kept(n.latents, n.patches, z, meet, x, qk_norm=norm)
        + _attention_kept(n.patches, n.latents, x, meet, z, qk_norm=norm)
        + (2 + config.layers_per_block) * _feed_forward_kept(n.latents, z)
        + _feed_forward_kept(n.patches, x)
        + config.layers_per_block * _attention_kept(n.latents, n.latents, z, z, qk_norm=norm)
    )
    inputs = Kept(stream=n.patches * x + n.latents * z)
    pixels = config.in_channels * config.patch_px**2
    # the embedded and the normed patches, the padded video, and the latents' self-conditioning
    rest = Kept(n.patches * x, n.patches * (x + pixels) + n.latents * 10 * z)
    return block, inputs, rest


def _dit_kept(config: DitConfig, n: Sizes) -> tuple[Kept, Kept, Kept]:
    d, c = config.dim, config.condition_dim
    block = (
        _attention_kept(n.patches, n.patches, d, d, qk_norm=config.qk_norm)
        + _attention_kept(n.patches, n.tokens, d, d, c, qk_norm=config.qk_norm)
        + _feed_forward_kept(n.patches, d)
        + Kept(n.patches * 4 * d)  # two inputs before they are modulated, two answers to gate
    )
    rest = Kept(n.patches * d, n.patches * (d + config.in_channels * config.patch_px**2))
    return block, Kept(stream=n.patches * d), rest


def activation_bytes(
    backbone: BackboneConfig,
    n: Sizes,
    *,
    batch: int,
    half: bool,
    checkpoint: bool,
    num_parameters: int = 0,
) -> int:
    """Peak bytes of activations of a batch.

    Args:
        backbone: the network.
        n: token counts of one sample.
        batch: samples at once.
        half: autocast to a 16-bit type.
        checkpoint: each block is recomputed in the backward pass.
        num_parameters: of the model; autocast keeps a 16-bit copy of those in use.
    """
    kept = kept_activations(backbone, n, checkpoint=checkpoint)
    copies = 2 * num_parameters // (backbone.num_blocks if checkpoint else 1) if half else 0
    stream = 2 if half and backbone.half_streams else 4
    return batch * kept.bytes(stream=stream, inner=2 if half else 4) + copies
