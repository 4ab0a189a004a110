"""The prompt encoder interface: prompts -> tokens, each with its role and segment; loading and caching.

    load_prompt_encoder(config)    the frozen encoder that a config names
    RememberingEncoder             keeps the last prompts' tokens in memory, by content

What outlives the process is made by `vimi-data encode` (model/encodings).
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from infra.clip import load_clip
from infra.config import canonical_json
from model.condition import Beforehand, Condition, EncodedBatch, EncodedPrompt, Prompt, pad
from model.data.batch import ROLES, role_number
from model.prompt.config import PromptEncoderConfig

HASHED_ROLES = 6
"""Roles whose order is part of an encoder's identity. Later ones are appended: the others keep their number."""
REMEMBERED_BYTES = 256 << 20
"""Tokens that a process keeps of the prompts that it has encoded, bytes. Ours."""


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

        Args:
            prompts: b prompts, after `select`.
            encoded: what was encoded beforehand; () = nothing.
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
        references: tuple[Tensor, Tensor] | None = None,
        encoded: Beforehand = (),
    ) -> Condition:
        """The generator's condition.

        Args:
            prompts: b prompts, after `select`.
            fps: `b` frames per second, inf for pictures.
            original_size_px: `b 2` (height, width).
            references: `reference_tensors(prompts, ...)` for `plus` mode.
            encoded: as in `encode`.
        """
        batch = self.encode(prompts, encoded)
        pictures, present = references or (None, None)
        return Condition(
            tokens=batch.tokens,
            mask=batch.mask,
            role=batch.role,
            segment=batch.segment,
            fps=fps,
            original_size_px=original_size_px,
            references=pictures,
            reference_mask=present,
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
        self.encoder, self.max_bytes = encoder, max_bytes
        self.dim, self.dtype = encoder.dim, encoder.dtype
        self.remembered: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self.num_bytes = 0

    @property
    def identity(self) -> dict[str, Any]:
        return self.encoder.identity

    @property
    def arithmetic(self) -> dict[str, Any]:
        return self.encoder.arithmetic

    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        keys = [prompt_key(self.content_hash, prompt) for prompt in prompts]
        found = {key: self.remembered[key] for key in keys if key in self.remembered}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        found |= zip(missing, self.encoder.encode_each(list(missing.values())), strict=True)
        for key, encoded in found.items():
            self._remember(key, encoded)
        return [found[key] for key in keys]

    def _remember(self, key: str, encoded: EncodedPrompt) -> None:
        if key not in self.remembered:
            self.num_bytes += encoded.num_bytes
        self.remembered[key] = encoded
        self.remembered.move_to_end(key)
        while self.num_bytes > self.max_bytes:
            _, gone = self.remembered.popitem(last=False)
            self.num_bytes -= gone.num_bytes


def load_prompt_encoder(
    config: PromptEncoderConfig, device: str | torch.device = "cpu", *, remember: bool = True
) -> PromptEncoder:
    """Load the frozen encoder onto `device`.

    Raises:
        ConfigError: an unknown model, unreadable files, or a hub that can't be reached.
    """
    encoder: PromptEncoder
    if config.clip is not None:
        from model.prompt.clip_encoder import ClipPromptEncoder

        encoder = ClipPromptEncoder(config, load_clip(config.clip, device, batch_size=config.batch_size))
    else:
        from model.prompt.mllm_encoder import load_mllm_encoder

        encoder = load_mllm_encoder(config, device)
    return RememberingEncoder(encoder) if remember else encoder
