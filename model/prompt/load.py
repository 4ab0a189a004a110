"""Loads the frozen prompt encoder that a config names."""

import torch

from infra.clip import check_clip, load_clip
from model.prompt.clip_encoder import ClipPromptEncoder
from model.prompt.encoder import PromptEncoder, PromptEncoderConfig, RememberingEncoder
from model.prompt.mllm_encoder import check_mllm, load_mllm_encoder


def load_prompt_encoder(
    config: PromptEncoderConfig, device: str | torch.device = "cpu", *, remember: bool = True
) -> PromptEncoder:
    """Load the frozen encoder onto `device`.

    Raises:
        ConfigError: an unknown model, unreadable files, or a hub that can't be reached.
    """
    encoder: PromptEncoder
    if config.clip is not None:
        encoder = ClipPromptEncoder(config, load_clip(config.clip, device, batch_size=config.batch_size))
    else:
        encoder = load_mllm_encoder(config, device)
    return RememberingEncoder(encoder) if remember else encoder


def check_prompt_encoder(config: PromptEncoderConfig, *, reach: bool = True) -> None:
    """Refuse an encoder that can't be loaded, without loading it.

    `reach` False asks no network: what would have to be fetched is taken to be there.

    Raises:
        ConfigError: as `load_prompt_encoder`.
    """
    if config.clip is not None:
        check_clip(config.clip, reach=reach)
    else:
        check_mllm(config, reach=reach)
