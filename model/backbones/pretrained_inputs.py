"""A condition as a pretrained transformer takes it: text states of one fixed length, references marked.

tokens of our encoder and of the model's own --TextStates--> `b length dim` states and their mask
the model's own alone                        --OwnText-----> the same
latents of references, roles, places         --ReferenceMarks--> latents that say what they are for
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.condition import MAX_SEGMENTS, Condition, ConditionConfig

NATIVE_SEGMENT = -1
"""Segment number of tokens that are states of the model's own text encoder; they come first in a prompt."""


class TextStates(nn.Module):
    """Tokens of the prompt encoder (and of the model's own) to `length` text states of width `dim`.

    `gated`: ours count nothing at first, so that the model starts as it is.
    """

    def __init__(self, condition: ConditionConfig, *, length: int, dim: int, gated: bool) -> None:
        super().__init__()
        self.length, self.dim = length, dim
        self.rows_per_state = -(-self.dim // condition.token_dim)
        self.norm = nn.LayerNorm(condition.token_dim, elementwise_affine=False)
        self.project = nn.Linear(condition.token_dim, self.dim)
        self.role = nn.Embedding(condition.num_roles, self.dim)
        self.segment = nn.Embedding(MAX_SEGMENTS, self.dim)
        for table in (self.role, self.segment):
            nn.init.normal_(table.weight, std=0.02)
        self.gate = nn.Parameter(torch.zeros(self.dim)) if gated else None

    def forward(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """`b length dim` text states, zero where there is none, and their `b length` mask.

        The model's own come first, ours follow at once, in the places that the model was trained to find empty:
        with a gate of 0 they still are. What is beyond the length is cut.
        """
        native_rows = ((condition.segment == NATIVE_SEGMENT) & condition.mask).sum(dim=1, keepdim=True)
        native = self._unpack(condition, native_rows)
        num_native = native_rows // self.rows_per_state
        place = torch.arange(self.length, device=condition.mask.device)[None]
        source = place - num_native + native_rows
        is_native, inside = place < num_native, (place >= num_native) & (source < condition.mask.shape[1])
        source = source.clamp(0, condition.mask.shape[1] - 1)
        is_ours = inside & condition.mask.gather(1, source)
        ours = self._project(condition, source)
        text = torch.where(is_native[..., None], native, torch.where(is_ours[..., None], ours, 0))
        return text, is_native | is_ours

    def _unpack(self, condition: Condition, native_rows: Tensor) -> Tensor:
        """States of the model's own encoder, each of which fills `rows_per_state` tokens."""
        length = self.length * self.rows_per_state
        tokens = condition.tokens.to(self.project.weight.dtype)[:, :length]
        tokens = F.pad(tokens, (0, 0, 0, length - tokens.shape[1]))
        return tokens.reshape(len(tokens), self.length, -1)[..., : self.dim]

    def _project(self, condition: Condition, source: Tensor) -> Tensor:
        tokens = condition.tokens.to(self.project.weight.dtype)
        tokens = tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[-1]))
        places = condition.segment.gather(1, source).clamp(0, MAX_SEGMENTS - 1)
        roles = condition.role.gather(1, source)
        ours = self.project(self.norm(tokens)) + self.role(roles) + self.segment(places)
        return ours if self.gate is None else self.gate * ours


class OwnText(nn.Module):
    """States of the model's own text encoder, padded with zeros to one fixed length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """As `TextStates.forward`."""
        tokens, mask = condition.tokens[:, : self.length].float(), condition.mask[:, : self.length]
        missing = self.length - tokens.shape[1]
        return F.pad(tokens * mask[..., None], (0, 0, 0, missing)), F.pad(mask, (0, missing))


class ReferenceMarks(nn.Module):
    """What a reference is for and where it stands in the prompt: an offset of its latents, 0 at first.

    A document, a subject and a background are clean frames alike to the transformer; the adapters learn to tell
    them apart by these. Ours.
    """

    def __init__(self, condition: ConditionConfig, channels: int) -> None:
        super().__init__()
        self.role = nn.Embedding(condition.num_roles, channels)
        self.place = nn.Embedding(MAX_SEGMENTS, channels)
        for table in (self.role, self.place):
            nn.init.zeros_(table.weight)

    def forward(self, condition: Condition) -> Tensor | None:
        """`b n c h w` marked latents; None where no prompt has any."""
        frames, role, place = condition.references, condition.reference_role, condition.reference_place
        if frames is None or role is None or place is None:
            return None
        marks = self.role(role) + self.place(place.clamp(max=MAX_SEGMENTS - 1))
        return frames + marks[..., None, None].to(frames.dtype)

    def nothing(self) -> Tensor:
        """0, by way of all weights: sharded ranks reduce the same gradients, with references or without."""
        return 0 * (self.role.weight.sum() + self.place.weight.sum())
