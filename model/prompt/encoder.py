"""What every prompt encoder gives: tokens with the role and the segment that each belongs to."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from infra.config import canonical_json
from model.condition import ROLES, Condition, Prompt


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, without padding; on the CPU."""

    tokens: Tensor
    """`l e` states of the frozen encoder."""
    role: Tensor
    """`l` int64, index in `model.condition.ROLES`."""
    segment: Tensor
    """`l` int64, position of the token's segment in its prompt."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_bytes(self) -> int:
        parts = (self.tokens, self.role, self.segment)
        return sum(part.numel() * part.element_size() for part in parts)


@dataclass(frozen=True)
class EncodedBatch:
    """Prompts of one batch, right padded to the longest (at least one token wide)."""

    tokens: Tensor
    """`b l e`; zero where padded."""
    mask: Tensor
    """`b l` bool, True = real token."""
    role: Tensor
    """`b l` int64."""
    segment: Tensor
    """`b l` int64."""

    def pin(self) -> "EncodedBatch":
        """Page-locked copies, so that the move to the device overlaps the step."""
        return EncodedBatch(**{name: part.pin_memory() for name, part in vars(self).items()})


Beforehand = EncodedBatch | Sequence[EncodedPrompt | None]
"""What was encoded before the batch was made: all of it, or some of its prompts (None for the others)."""


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
        """Hex sha256 of `identity` and of the order of the roles; the same on every machine."""
        return sha256(canonical_json({"roles": ROLES, **self.identity})).hexdigest()

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


def pad(prompts: Sequence[EncodedPrompt], dim: int, dtype: torch.dtype) -> EncodedBatch:
    """Right pad to the longest; the padding is zero and masked."""
    shape = (len(prompts), max(1, *map(len, prompts)) if prompts else 1)
    tokens = torch.zeros(*shape, dim, dtype=dtype)
    mask = torch.zeros(shape, dtype=torch.bool)
    role = torch.zeros(shape, dtype=torch.long)
    segment = torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        length = len(prompt)
        tokens[row, :length] = prompt.tokens
        mask[row, :length] = True
        role[row, :length] = prompt.role
        segment[row, :length] = prompt.segment
    return EncodedBatch(tokens, mask, role, segment)


def join(parts: Sequence[tuple[int, str, Tensor]], dim: int, dtype: torch.dtype) -> EncodedPrompt:
    """(segment position, role, tokens `l e`) of each segment, in order -> one prompt."""
    lengths = torch.tensor([len(tokens) for _, _, tokens in parts], dtype=torch.long)
    places = torch.tensor([place for place, _, _ in parts], dtype=torch.long)
    roles = torch.tensor([ROLES.index(role) for _, role, _ in parts], dtype=torch.long)
    tokens = [tokens.to("cpu", dtype) for _, _, tokens in parts]
    return EncodedPrompt(
        tokens=torch.cat(tokens) if tokens else torch.zeros(0, dim, dtype=dtype),
        role=roles.repeat_interleave(lengths),
        segment=places.repeat_interleave(lengths),
    )
