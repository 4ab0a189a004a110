"""Real pipelines of diffusers with random weights, saved as users have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as installed
import torch

from tests.model.tiny_autoencoders import ltx as ltx_autoencoder
from tests.model.tiny_autoencoders import wan as wan_autoencoder

diffusers: Any = installed
WORDS = (
    *("a", "dog", "runs", "on", "grass", "cat", "and", "the", "red", "blue", "green", "square", "moves", "to"),
    *("right", "generate", "video", "with", "text", "image"),
)


def tokenizer() -> Any:
    """One token a word, and T5's pad, end and unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: n for n, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def umt5(dim: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(WORDS) + 3, d_model=dim, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def wan_transformer(**changes: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32}
    return diffusers.WanTransformer3DModel(
        **{**sizes, "in_channels": 3, "out_channels": 3, "text_dim": 20, "freq_dim": 16, **changes}
    )


def skyreels_transformer(**changes: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32}
    return diffusers.SkyReelsV2Transformer3DModel(
        **{**sizes, "in_channels": 3, "out_channels": 3, "text_dim": 20, "freq_dim": 16, **changes}
    )


def ltx_transformer(**changes: Any) -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24}
    return diffusers.LTXVideoTransformer3DModel(
        **{**sizes, "in_channels": 8, "out_channels": 8, "caption_channels": 20, **changes}
    )


def t5(dim: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5EncoderModel(T5Config(vocab_size=len(WORDS) + 3, d_model=dim, **sizes)).eval()


def save_skyreels(folder: Path, **changes: Any) -> str:
    """As `save_wan`, with SkyReels' transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = diffusers.SkyReelsV2Pipeline(
            tokenizer=tokenizer(),
            text_encoder=umt5(20),
            vae=wan_autoencoder(),
            scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=8.0),
            transformer=skyreels_transformer(**changes),
        )
    pipeline.save_pretrained(folder)
    return str(folder)


def save_ltx(folder: Path, **changes: Any) -> str:
    """Latents of 8 channels; the scheduler's shift hangs on the size, as LTX's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = diffusers.LTXPipeline(
            tokenizer=tokenizer(),
            text_encoder=t5(20),
            vae=ltx_autoencoder(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.95,
                max_shift=2.05, shift_terminal=0.1,
            ),
            transformer=ltx_transformer(**changes),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return str(folder)


def save_wan(folder: Path, *, seed: int = 0, shift: float = 3.0, **changes: Any) -> str:
    """Latents of 3 channels, 8 pixels and 4 frames; patches of 2 x 2."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = wan_transformer(**changes)
        pipeline = diffusers.WanPipeline(
            tokenizer=tokenizer(),
            text_encoder=umt5(transformer.config.text_dim),
            vae=wan_autoencoder(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
            transformer=transformer,
        )
    pipeline.save_pretrained(folder)
    return str(folder)


SAVERS: dict[str, Callable[..., str]] = {
    "WanTransformer3DModel": save_wan,
    "LTXVideoTransformer3DModel": save_ltx,
    "SkyReelsV2Transformer3DModel": save_skyreels,
}
