"""Captions through the text encoder of a pretrained video model, alone or beside our own prompt encoder.

The model's stock pipeline encodes them, so that they are what the model was trained on. Beside our encoder's
tokens its states come first, marked by a segment number of their own; as they are wider, each is packed into as
many tokens as it takes (`model.backbones.pretrained` unpacks them).
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from infra.clip.model import hash_weights
from infra.errors import ConfigError
from infra.pretrained import hash_stored_weights, or_refused
from model.backbones.folder import local_folder, read_base
from model.backbones.pretrained_inputs import NATIVE_SEGMENT
from model.condition import EncodedPrompt, Prompt
from model.data.batch import Role, role_number
from model.prompt.encoder import PromptEncoder, config_text
from model.prompt.select import restore_words

PARTS = {"text_encoder": ("*.safetensors", "*.bin"), "tokenizer": ("*.json", "*.model")}
"""Parts of a pipeline that read captions, and files one of which each must hold."""
WITHOUT = {"transformer": None, "vae": None, "scheduler": None}
"""Parts of a pipeline that read no text."""


def caption_text(prompt: Prompt) -> str:
    """The words that the model's own encoder reads: the caption, with those that pictures stand for."""
    texts = [(segment.text or "").strip() for segment in restore_words(prompt) if segment.role == Role.CAPTION]
    return " ".join(text for text in texts if text)


class OwnTextEncoder(PromptEncoder):
    """The text encoder of a pipeline as a prompt encoder: pictures and documents it doesn't see."""

    def __init__(self, place: str, pipeline: Any, device: torch.device, weight_hash: str) -> None:
        """`weight_hash`: of the text encoder's files."""
        self.place, self.pipeline, self.weight_hash = place, pipeline, weight_hash
        self.family = read_base(place).family
        self.pipeline.text_encoder.eval().requires_grad_(False).to(device)
        self.dim = int(read_text_dim(pipeline))
        self.dtype = next(pipeline.text_encoder.parameters()).dtype
        self.device = device

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "own_text",
            "pipeline": self.family.pipeline,
            "text_tokens": self.family.text_tokens,
            "weights": self.weight_hash,
            "config": sha256(config_text(self.pipeline.text_encoder).encode()).hexdigest(),
            "tokenizer": sha256(self.pipeline.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        }

    @property
    def arithmetic(self) -> dict[str, Any]:
        weights = hash_weights(self.pipeline.text_encoder)
        return {"dtype": str(self.dtype), "device": self.device.type, "exact": weights}

    @torch.no_grad()
    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Texts go one by one, so that their states don't hang on their company."""
        states = [self._states(caption_text(prompt)) for prompt in prompts]
        role = role_number(Role.CAPTION)
        return [
            EncodedPrompt(each, torch.full((len(each),), role), torch.zeros(len(each), dtype=torch.long))
            for each in states
        ]

    def _states(self, text: str) -> Tensor:
        states, mask = self.family.encode_texts(self.pipeline, [text])
        return states[0][mask[0]].to("cpu", self.dtype)


class BesideOwnText(PromptEncoder):
    """Our prompt encoder's tokens behind the states of the model's own text encoder."""

    def __init__(self, encoder: PromptEncoder, own: OwnTextEncoder) -> None:
        self.encoder, self.own, self.dim = encoder, own, encoder.dim
        self.dtype = torch.promote_types(encoder.dtype, own.dtype)

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "beside_own_text", "encoder": self.encoder.identity, "own": self.own.identity}

    @property
    def arithmetic(self) -> dict[str, Any]:
        return {"encoder": self.encoder.arithmetic, "own": self.own.arithmetic}

    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        pairs = zip(self.own.encode_each(prompts), self.encoder.encode_each(prompts), strict=True)
        return [self._join(own, ours) for own, ours in pairs]

    def _join(self, own: EncodedPrompt, ours: EncodedPrompt) -> EncodedPrompt:
        packed = pack(own.tokens.to(self.dtype), self.dim)
        role = torch.full((len(packed),), role_number(Role.CAPTION))
        return EncodedPrompt(
            tokens=torch.cat([packed, ours.tokens.to(self.dtype)]),
            role=torch.cat([role, ours.role]),
            segment=torch.cat([torch.full((len(packed),), NATIVE_SEGMENT), ours.segment]),
        )


def pack(states: Tensor, dim: int) -> Tensor:
    """States `n d` as `n k` tokens of width `dim`, k as few as hold one of them, the rest zero."""
    tokens = -(-states.shape[1] // dim)
    return F.pad(states, (0, tokens * dim - states.shape[1])).reshape(-1, dim)


def read_text_dim(pipeline: Any) -> int:
    """Width of the states of a pipeline's text encoder."""
    return pipeline.text_encoder.config.d_model


def check_own_text(place: str) -> None:
    """Refuse a folder without text encoder and tokenizer, or with empty ones.

    Raises:
        ConfigError: names the part that is missing.
    """
    folder = Path(place).expanduser()
    for part, patterns in PARTS.items():
        files = [file for pattern in patterns for file in (folder / part).glob(pattern)]
        if folder.is_dir() and not files:
            raise ConfigError(
                f"backbone.model {place} holds no {part}, which reads the captions",
                legal="text: replace, which needs none, or the whole pipeline",
            )


def load_own_text(place: str, device: str | torch.device = "cpu") -> OwnTextEncoder:
    """Load a pipeline's text encoder and tokenizer; bfloat16 on a GPU, else float32.

    Raises:
        ConfigError: no such folder, or one that can't be read.
    """
    check_own_text(place)
    family, device = read_base(place).family, torch.device(device)
    import diffusers
    from diffusers.utils import logging as theirs
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cls: Any = getattr(diffusers, family.pipeline)
    with or_refused(f"can't load the text encoder of {place}"):
        pipeline = cls.from_pretrained(place, **WITHOUT, dtype=dtype)
        weight_hash = hash_stored_weights(local_folder(place, ["text_encoder/*"]) / "text_encoder")
    return OwnTextEncoder(place, pipeline, device, weight_hash)
