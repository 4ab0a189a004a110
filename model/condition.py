"""Condition embedder: encoded prompt, time, frame rate and size -> tokens that the generator attends to.

    Segment, Prompt               what the user says: ordered text and pictures, each with a role
    EncodedPrompt, EncodedBatch   the same as tokens of a frozen encoder (model/prompt makes them)
    Condition                     with frame rate, size and reference pictures
    ConditionEmbedder             the trained part: [sigma, frame rate, size] ++ prompt ++ references

Snap Video reads `[sigma, frame rate, original resolution] ++ T5 tokens` (2402.14797); VIMI swaps
the text tokens for those of a multimodal language model and keeps them interleaved (2407.06304).
`plus` adds patches of the reference pictures (pixels, or latents where the generator works in those),
because references that pass through the frozen encoder alone lose their identity (UniVideo, 2510.08377,
table 6). A patch bears the embedding of its picture's place in the prompt, the same that the encoder's
tokens of that picture bear: so what is seen is tied to what is said of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("text", "retrieved", "subject", "frame")
"""Condition kinds that dropout and guidance switch on and off; each role of a prompt belongs to one."""


@dataclass(frozen=True)
class Segment:
    """One piece of a prompt: text, or an encoded JPEG/PNG picture."""

    type: Literal["text", "image"]
    role: str
    text: str | None = None
    image: bytes | None = None


Prompt = tuple[Segment, ...]


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, without padding; on the CPU."""

    tokens: Tensor
    """`l e` states of the frozen encoder."""
    role: Tensor
    """`l` int64, number of the token's role."""
    segment: Tensor
    """`l` int64, position of the token's segment in its prompt."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self.tokens, self.role, self.segment))


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


@dataclass(frozen=True)
class References:
    """The pictures of a batch's prompts that the generator sees itself; what is masked is zero."""

    pictures: Tensor
    """`b n 3 h w` uint8, in the prompt's order, or `b n c h w` float32 latents that were made beforehand; n is
    the most that any prompt has."""
    mask: Tensor
    """`b n` bool, True = there."""
    role: Tensor
    """`b n` int64, number of the segment's role."""
    place: Tensor
    """`b n` int64, position of the segment in its prompt."""

    def pin(self) -> "References":
        """Page-locked copies, so that the move to the device overlaps the step."""
        return References(**{name: part.pin_memory() for name, part in vars(self).items()})


def concat_references(each: Sequence[References]) -> References:
    """Stack batches with different numbers of references into one, the missing ones masked."""
    most = max(one.mask.shape[1] for one in each)
    some = next((one for one in each if one.mask.shape[1]), each[0]).pictures

    def padded(one: References) -> list[Tensor]:
        if not one.mask.shape[1]:  # the shape of no picture says nothing
            one = replace(one, pictures=some.new_zeros(len(one.mask), 0, *some.shape[2:]))
        return [_pad_dim1(part, most) for part in vars(one).values()]

    return References(*map(torch.cat, zip(*map(padded, each), strict=True)))


@dataclass(frozen=True)
class Condition:
    """A batch of encoded prompts, right padded.

    Attributes:
        tokens: `b l e` states of the frozen encoder.
        mask: `b l` bool, True where the token is real.
        role: `b l` int64, number of the token's role.
        segment: `b l` int64, position of the token's segment in its prompt.
        fps: `b` frames per second of the target; inf for pictures.
        original_size_px: `b 2` (height, width) of the target before it was resized.
        references: `b n c h w`, reference pictures of `plus` mode: pixels in [-1, 1], or latents.
        reference_mask: `b n` bool, True where the reference is real.
        reference_role: `b n` int64, number of the reference's role; 0 where masked.
        reference_place: `b n` int64, position of the reference's segment in its prompt; 0 where masked.
        has_first_frame: `b` bool, True where frame 0 of the video is given and stands in it without noise;
            None = nowhere.
    """

    tokens: Tensor
    mask: Tensor
    role: Tensor
    segment: Tensor
    fps: Tensor
    original_size_px: Tensor
    references: Tensor | None = None
    reference_mask: Tensor | None = None
    reference_role: Tensor | None = None
    reference_place: Tensor | None = None
    has_first_frame: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Condition":
        """Move to `device`; `dtype` is for tokens and references only (fps stays float32)."""
        halved = ("tokens", "references")
        moved = {
            name: part.to(device, dtype if name in halved else None, non_blocking=True)
            for name, part in vars(self).items()
            if part is not None
        }
        return replace(self, **moved)

    def select(self, rows: Tensor) -> "Condition":
        """The prompts named by `rows` (int64 indices or a bool mask), in that order."""
        kept = {k: v[rows] for k, v in vars(self).items() if v is not None}
        return replace(self, **kept)


def concat_conditions(conditions: list[Condition]) -> Condition:
    """Stack batches of different lengths into one, padding tokens and references with hidden ones.

    Raises:
        ValueError: some of the batches have references and others have none.
    """
    if len({c.references is None for c in conditions}) != 1:
        raise ValueError("cannot mix conditions with and without references in one batch")
    length = max(c.tokens.shape[1] for c in conditions)
    count = max(0 if c.references is None else c.references.shape[1] for c in conditions)
    given = [c.mask.new_zeros(len(c)) if c.has_first_frame is None else c.has_first_frame for c in conditions]

    def stack(name: str, to: int | None) -> Tensor:
        parts = [getattr(c, name) for c in conditions]
        return torch.cat(parts if to is None else [_pad_dim1(p, to) for p in parts])

    of_references = ("references", "reference_mask", "reference_role", "reference_place")
    return Condition(
        **{name: stack(name, length) for name in ("tokens", "mask", "role", "segment")},
        **{name: stack(name, None) for name in ("fps", "original_size_px")},
        **({name: stack(name, count) for name in of_references} if count else {}),
        has_first_frame=torch.cat(given) if any(c.has_first_frame is not None for c in conditions) else None,
    )


def _pad_dim1(x: Tensor, to: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, to - x.shape[1]))


@dataclass(frozen=True)
class ConditionConfig:
    """Shapes of the trained condition embedder.

    Attributes:
        token_dim: width `e` of the frozen encoder's states (T5-11B and CLIP ViT-H: 1024).
        mode: `faithful` reads references through the frozen encoder only, as VIMI's figures show;
            `plus` also reads their pixel patches, and is told where frame 0 of the video is given.
        num_roles: roles of segments and references that have an embedding.
        reference_channels: of the references: 3 for pixels.
        reference_patch: side of their patches, in pixels or latents.
    """

    token_dim: int = 1024
    mode: Literal["faithful", "plus"] = "faithful"
    num_roles: int = 6
    reference_channels: int = 3
    reference_patch: int = 8


MAX_SEGMENTS = 16
"""Positions of the segment embedding; later segments share the last one. Ours."""
MAX_REFERENCES = 8
"""Reference pictures of a prompt that the generator sees itself (`plus` mode). Ours."""
NUM_SCALARS = 3
"""Tokens that every sample has: sigma, frame rate, original size."""


class ConditionEmbedder(nn.Module):
    """Trained embedding of a `Condition` and the noise level: `b k dim` tokens and their mask."""

    def __init__(self, config: ConditionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.token_dim, elementwise_affine=False)
        self.project = nn.Linear(config.token_dim, dim)
        self.role = nn.Embedding(config.num_roles, dim)
        self.segment = nn.Embedding(MAX_SEGMENTS, dim)
        self.sigma = nn.Linear(NUM_FEATURES, dim)
        self.fps = nn.Linear(NUM_FEATURES, dim)
        self.size = nn.Linear(2 * NUM_FEATURES, dim)
        self.references = ReferenceEmbedder(config, dim) if config.mode == "plus" else None
        self.first_frame = nn.Parameter(torch.zeros(dim)) if config.mode == "plus" else None
        for table in (self.role, self.segment):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Tokens that the latents read.

        Args:
            sigma: `b` noise levels.
            condition: the encoded prompts.

        Returns:
            `b k dim` tokens and the `b k` bool mask, k = 3 + l (+ reference patches if `plus`).
        """
        tokens = [self._scalars(sigma, condition), self._prompt(condition)]
        masks = [condition.mask.new_ones(len(condition), NUM_SCALARS), condition.mask]
        pictures, present, role = condition.references, condition.reference_mask, condition.reference_role
        if self.references is not None and pictures is not None:
            if present is None or role is None or condition.reference_place is None:
                raise ValueError("references without reference_mask, reference_role or reference_place")
            extra, extra_mask = self.references(pictures, present, role, self._place(condition.reference_place))
            tokens.append(extra)
            masks.append(extra_mask)
        return torch.cat([t.to(tokens[0].dtype) for t in tokens], dim=1), torch.cat(masks, dim=1)

    def _scalars(self, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.role.weight.dtype
        noise = fourier_features(sigma.float().log() / 4).to(dtype)  # EDM's c_noise
        rate = fourier_features(_pace(condition.fps)).to(dtype)
        log_size = (condition.original_size_px.float() / 64).log2() / 4
        size = fourier_features(log_size).flatten(-2).to(dtype)
        sigma = self.sigma(noise)
        if self.first_frame is not None:
            given = condition.has_first_frame
            # In every step's graph, given or not: sharded ranks reduce the same gradients.
            flags = sigma.new_zeros(len(condition)) if given is None else given.to(dtype)
            sigma = sigma + flags[:, None] * self.first_frame
        return torch.stack([sigma, self.fps(rate), self.size(size)], dim=1)

    def _prompt(self, condition: Condition) -> Tensor:
        projected = self.project(self.norm(condition.tokens.to(self.role.weight.dtype)))
        return projected + self.role(condition.role) + self._place(condition.segment)

    def _place(self, segment: Tensor) -> Tensor:
        """Embedding of a segment's position in the prompt, for its tokens and for its picture's patches."""
        return self.segment(segment.clamp(max=MAX_SEGMENTS - 1))


class ReferenceEmbedder(nn.Module):
    """Patches of reference pictures, each with its place in the picture, the picture's in the prompt, and role.

    The role tells a retrieved document from the subject, the background and the first frame of an
    instruction: without it a model could only guess from the order what a picture is for.
    """

    def __init__(self, config: ConditionConfig, dim: int) -> None:
        super().__init__()
        self.side = config.reference_patch
        self.patch = nn.Linear(config.reference_channels * self.side**2, dim)
        self.place = nn.Linear(2 * NUM_FEATURES, dim)
        self.role = nn.Embedding(config.num_roles, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.role.weight, std=0.02)

    def forward(self, pictures: Tensor, present: Tensor, role: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """`b n c h w` pictures, `b n` mask and roles to `b (n p) dim` tokens and `b (n p)` mask.

        `order` is `b n dim`, the embedding of each picture's place in its prompt.
        """
        b, n, c, h, w = pictures.shape
        p = self.side
        if h % p or w % p:
            raise ValueError(f"reference of {h}x{w} does not divide into patches of {p}")
        if n > MAX_REFERENCES:
            raise ValueError(f"{n} references; legal: at most {MAX_REFERENCES}")
        dtype = self.role.weight.dtype
        grid = pictures.reshape(b, n, c, h // p, p, w // p, p).permute(0, 1, 3, 5, 2, 4, 6)
        patches = grid.reshape(b, n, (h // p) * (w // p), c * p * p).to(dtype)
        places = self.place(_grid_features(h // p, w // p, pictures.device).to(dtype))
        each = order + self.role(role)
        tokens = self.norm(self.patch(patches) + places + each[:, :, None])
        return tokens.flatten(1, 2), present.repeat_interleave(tokens.shape[2], dim=1)


NUM_FEATURES = 64
"""Fourier features of one scalar: 32 sines and 32 cosines."""


def fourier_features(x: Tensor) -> Tensor:
    """Sines and cosines of `x` (about [-2, 2]) at 32 frequencies, 1/4 ... 64 rad a unit: `... 64`.

    The frequencies are this project's choice; Snap Video does not state its own.
    """
    octaves = torch.linspace(-2.0, 6.0, NUM_FEATURES // 2, device=x.device)
    angles = x.float()[..., None] * octaves.exp2()
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _pace(fps: Tensor) -> Tensor:
    """Frame rate on a scale without infinities: 0 for pictures (infinite rate), 1/2 at 24 fps."""
    return 1.0 / (1.0 + fps.float() / 24.0)


def _grid_features(height: int, width: int, device: torch.device) -> Tensor:
    """`(height width) 2*NUM_FEATURES` features of the centres of a grid of patches in [-1, 1]."""
    ys = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
    xs = (torch.arange(width, device=device) + 0.5) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), dim=-1)
    return fourier_features(grid * math.pi / 2).reshape(height * width, 2 * NUM_FEATURES)
