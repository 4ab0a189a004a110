"""From a `PromptEncoderConfig` to a `PromptEncoder`, cached if the config says so."""

import torch

from infra.clip import load_clip
from model.prompt.config import PromptEncoderConfig
from model.prompt.encoder import PromptEncoder


def load_prompt_encoder(config: PromptEncoderConfig, device: str | torch.device = "cpu") -> PromptEncoder:
    """Load the frozen encoder onto `device`.

    Raises:
        ConfigError: an unknown model, unreadable files, or a hub that can't be reached.
    """
    encoder: PromptEncoder
    if config.kind == "clip":
        from model.prompt.clip_encoder import ClipPromptEncoder

        encoder = ClipPromptEncoder(config, load_clip(config.clip, device))
    else:
        from model.prompt.mllm_encoder import load_mllm_encoder

        encoder = load_mllm_encoder(config, device)
    if config.cache is None:
        return encoder
    from model.prompt.cache import CachedPromptEncoder, EncodingCache

    return CachedPromptEncoder(encoder, EncodingCache.of(config.cache))
