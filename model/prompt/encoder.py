"""The prompt encoder interface: prompts -> tokens, each with its role and segment; its config and its cache.

    PromptEncoderConfig            which frozen encoder: a language model that sees pictures, or a CLIP
    RememberingEncoder             keeps the last prompts' tokens in memory, by content

What outlives the process is made by `vimi-data encode` (model/encodings).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from infra.clip import OFFLINE, OFFLINE_TOKENS, ClipConfig
from infra.config import Config, Incidental, NameOrFolder, canonical_json
from infra.recent import Recent
from model.condition import Beforehand, Condition, EncodedBatch, EncodedPrompt, Prompt, References, pad
from model.data.batch import ROLES, role_number

HASHED_ROLES = 6
"""Roles whose order is part of an encoder's identity. Later ones are appended: the others keep their number."""
REMEMBERED_BYTES = 256 << 20
"""Tokens that a process keeps of the prompts that it has encoded, bytes. Ours."""


class PromptEncoderConfig(Config):
    """Names a frozen encoder. VIMI draws an MLLM (paper, both figures); which one, it does not say.

    Computed, not measured: weights = parameters (as the model cards state them) x 2 bytes (bf16), without
    activations; tokens of one square picture of 448 pixels a side, unsplit; TFLOP of the forward of
    a prompt of 100 words' tokens and two pictures = 2 x parameters x tokens. LLaVA-1.5 resizes to 336.

    | family | `model` | parameters | weights | tokens a picture | TFLOP a prompt |
    |---|---|---|---|---|---|
    | SmolVLM | `HuggingFaceTB/SmolVLM-256M-Instruct` | 0.26 B | 0.5 GB | 64 + 3 | 0.1 |
    | SmolVLM | `HuggingFaceTB/SmolVLM-500M-Instruct` | 0.51 B | 1.0 GB | 64 + 3 | 0.2 |
    | SmolVLM | `HuggingFaceTB/SmolVLM-Instruct` | 2.2 B | 4.5 GB | 81 + 3 | 1.2 |
    | Qwen-VL | `Qwen/Qwen2.5-VL-3B-Instruct` | 3.8 B | 7.5 GB | 256 + 2 | 4.6 |
    | Qwen-VL | `Qwen/Qwen2.5-VL-7B-Instruct` | 8.3 B | 17 GB | 256 + 2 | 10 |
    | LLaVA | `llava-hf/llava-1.5-7b-hf` | 7.1 B | 14 GB | 576 | 18 |
    | LLaVA | `llava-hf/llava-1.5-13b-hf` | 13 B | 27 GB | 576 | 33 |
    | CLIP | `clip.name: ViT-B-32` | 0.15 B | 0.6 GB (fp32) | 49, or `patch_grid`^2 | 0.02 |
    | CLIP | `clip.name: offline` | 0.03 B | 0.1 GB (fp32) | 49, or `patch_grid`^2 | 0.005 |
    """

    model: NameOrFolder = "HuggingFaceTB/SmolVLM-256M-Instruct"
    """Language model that sees text and pictures (an mllm), whose hidden states are the tokens: id on the model
    hub, or a folder with config, weights, tokenizer and processor."""
    clip: ClipConfig | None = None
    """A CLIP in its place, whose text and patch states are the tokens; null = `model`."""
    layer: Literal["last", "penultimate"] | int = "penultimate"
    """mllm: hidden states after the final norm (last), before the last layer (penultimate), or at an index:
    0 = embeddings, n = after layer n, negative = from the end. VIMI does not say; penultimate is usual."""
    max_tokens: int = Field(default=2048, ge=8, le=1_000_000)
    """Most tokens of a prompt; longer ones are cut as `model.prompt.select.fit` says."""
    captions: NameOrFolder | None = None
    """Folder or hub id of a pipeline of diffusers whose own text encoder reads the caption, before our tokens:
    set by a pretrained backbone with `text: append` or `native`."""
    captions_alone: bool = False
    """It alone reads the prompt: no `model` or `clip`, no pictures (`text: native`)."""
    patch_grid: int | None = Field(default=None, ge=1, le=256)
    """clip: average the patches of a picture to at most n x n tokens; None = all patches."""
    batch_size: Incidental[int] = Field(default=1, ge=1, le=65536)
    """Prompts (clip: texts or pictures) per forward. 1 makes the tokens of a prompt the same to the last bit
    whatever it is batched with, which exact resume needs; more is faster on a GPU."""

    def identity(self) -> dict[str, Any]:
        """The fields that decide the tokens, and what the code alone decides of them."""
        unused = ("captions", "captions_alone") if self.captions is None else ()
        found = {**super().identity(), **self.token_version}
        return {name: value for name, value in found.items() if name not in unused}

    @property
    def token_version(self) -> dict[str, int]:
        """Version of the offline CLIP's picture tokens: what was made with another is refused, not mixed."""
        is_offline = self.clip is not None and self.clip.name == OFFLINE
        return {"picture_tokens": OFFLINE_TOKENS} if is_offline else {}


class PromptEncoder(ABC):
    """A frozen encoder of prompts. Subclasses say `dim`, `identity` and `encode_each`."""

    dim: int
    """Width e of the tokens."""
    dtype: torch.dtype
    """Of the tokens."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the tokens of a prompt mean: weights, tokenizer, preprocessing, layer, limits."""

    @property
    @abstractmethod
    def arithmetic(self) -> dict[str, Any]:
        """What else decides their last bits: dtypes, exact weights."""

    @abstractmethod
    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Encode prompts, in the order given; an empty prompt has no tokens."""

    @cached_property
    def identity_hash(self) -> str:
        """Hex sha256 of `identity` and of the order of the first roles; the same on every machine."""
        return sha256(canonical_json({"roles": list(ROLES)[:HASHED_ROLES], **self.identity})).hexdigest()

    @cached_property
    def content_hash(self) -> str:
        """Hex sha256 of `identity_hash` and `arithmetic`: equal only if tokens are equal to the bit."""
        return sha256(canonical_json({"identity": self.identity_hash, **self.arithmetic})).hexdigest()

    def encode(self, prompts: Sequence[Prompt], encoded: Beforehand = ()) -> EncodedBatch:
        """Encode prompts and pad them to one batch.

        `encoded` is what was encoded beforehand; () = nothing.
        """
        if isinstance(encoded, EncodedBatch):
            return encoded
        known = list(encoded) or [None] * len(prompts)
        missing = [prompt for prompt, there in zip(prompts, known, strict=True) if there is None]
        made = iter(self.encode_each(missing) if missing else ())
        return pad([next(made) if there is None else there for there in known], self.dim, self.dtype)

    def condition(
        self,
        prompts: Sequence[Prompt],
        *,
        fps: Tensor,
        original_size_px: Tensor,
        references: References | None = None,
        encoded: Beforehand = (),
    ) -> Condition:
        """The generator's condition.

        Prompts as they are after `select`; `references` are their `reference_tensors` in `plus` mode.
        """
        batch = self.encode(prompts, encoded)
        return Condition(
            tokens=batch.tokens,
            mask=batch.mask,
            role=batch.role,
            segment=batch.segment,
            fps=fps,
            original_size_px=original_size_px,
            references=references.pictures if references else None,
            reference_mask=references.mask if references else None,
            reference_role=references.role if references else None,
            reference_place=references.place if references else None,
        )


def join(parts: Sequence[tuple[int, str, Tensor]], dim: int, dtype: torch.dtype) -> EncodedPrompt:
    """(segment position, role, tokens `l e`) of each segment, in order -> one prompt."""
    lengths = torch.tensor([len(tokens) for _, _, tokens in parts], dtype=torch.long)
    places = torch.tensor([place for place, _, _ in parts], dtype=torch.long)
    roles = torch.tensor([role_number(role) for _, role, _ in parts], dtype=torch.long)
    tokens = [tokens.to("cpu", dtype) for _, _, tokens in parts]
    return EncodedPrompt(
        tokens=torch.cat(tokens) if tokens else torch.zeros(0, dim, dtype=dtype),
        role=roles.repeat_interleave(lengths),
        segment=places.repeat_interleave(lengths),
    )


def prompt_key(encoder_hash: str, prompt: Prompt) -> str:
    """Hex sha256 over the encoder's `content_hash` and the prompt; every part is length-prefixed."""
    digest = sha256()

    def add(part: bytes | None) -> None:
        digest.update(b"\0" if part is None else b"\1" + len(part).to_bytes(8, "little"))
        digest.update(part or b"")

    add(encoder_hash.encode())
    for segment in prompt:
        add(segment.type.encode())
        add(segment.role.encode())
        add(None if segment.text is None else segment.text.encode("utf-8", "surrogatepass"))
        add(segment.image)
    return digest.hexdigest()


class RememberingEncoder(PromptEncoder):
    """Keeps tokens in memory by the prompt's content, least recently used out first."""

    def __init__(self, encoder: PromptEncoder, max_bytes: int = REMEMBERED_BYTES) -> None:
        self.encoder = encoder
        self.dim, self.dtype = encoder.dim, encoder.dtype
        self.remembered: Recent[str, EncodedPrompt] = Recent(max_bytes)

    @property
    def identity(self) -> dict[str, Any]:
        return self.encoder.identity

    @property
    def arithmetic(self) -> dict[str, Any]:
        return self.encoder.arithmetic

    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        keys = [prompt_key(self.content_hash, prompt) for prompt in prompts]
        found = {key: there for key in keys if (there := self.remembered.find(key)) is not None}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        for key, made in zip(missing, self.encoder.encode_each(list(missing.values())), strict=True):
            found[key] = made
            self.remembered.keep(key, made, made.num_bytes)
        return [found[key] for key in keys]


def config_text(model: Any) -> str:
    """The config of a model of transformers as JSON, without its place and the dtype that it was loaded in."""
    passing = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "_attn_implementation")

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in passing}
        return value

    return json.dumps(clean(model.config.to_dict()), sort_keys=True, default=str)
