"""Loads the frozen prompt encoder that a config names."""

import torch

from infra.clip import check_clip, load_clip
from model.prompt.clip_encoder import ClipPromptEncoder
from model.prompt.encoder import PromptEncoder, PromptEncoderConfig, RememberingEncoder
from model.prompt.mllm_encoder import check_mllm, load_mllm_encoder
from model.prompt.own_text import BesideOwnText, check_own_text, load_own_text


def load_prompt_encoder(
    config: PromptEncoderConfig, device: str | torch.device = "cpu", *, remember: bool = True
) -> PromptEncoder:
    """Load the frozen encoder onto `device`.

    Raises:
        ConfigError: an unknown model, unreadable files, or a hub that can't be reached.
    """
    encoder = _load(config, device)
    return RememberingEncoder(encoder) if remember else encoder


def _load(config: PromptEncoderConfig, device: str | torch.device) -> PromptEncoder:
    own = load_own_text(config.captions, device) if config.captions is not None else None
    if own is not None and config.captions_alone:
        return own
    encoder: PromptEncoder
    if config.clip is not None:
        encoder = ClipPromptEncoder(config, load_clip(config.clip, device, batch_size=config.batch_size))
    else:
        encoder = load_mllm_encoder(config, device)
    return encoder if own is None else BesideOwnText(encoder, own)


def check_prompt_encoder(config: PromptEncoderConfig, *, reach: bool = True) -> None:
    """Refuse an encoder that can't be loaded, without loading it.

    `reach` False asks no network: what would have to be fetched is taken to be there.

    Raises:
        ConfigError: as `load_prompt_encoder`.
    """
    if config.captions is not None:
        check_own_text(config.captions)
    if config.captions_alone:
        return
    if config.clip is not None:
        check_clip(config.clip, reach=reach)
    else:
        check_mllm(config, reach=reach)
