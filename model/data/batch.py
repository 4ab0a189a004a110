"""Samples, batches and their collation; the only reader of `pipeline.schema` in `model`.

The rest of `model` takes roles, tasks and kinds of targets from here. Frames stay uint8 until they are on the
device: a quarter of the bytes to move.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from infra.errors import ConfigError, DataError
from model.condition import (
    Beforehand,
    EncodedBatch,
    EncodedPrompt,
    Prompt,
    References,
    Segment,
    concat_references,
    pad,
)
from pipeline.schema import PROMPTS, ROLES, TASKS, Role, TargetKind, check_table, content_id

__all__ = [
    "ROLES",
    "TASKS",
    "Batch",
    "Role",
    "Sample",
    "TargetKind",
    "as_video",
    "check_schema",
    "collate",
    "noise_key",
    "read_prompt",
    "role_number",
]

TARGET_BYTES = "target.data"
ROW_COLUMNS = [
    *("prompt_id", "clip_id", "task", "media", "source_uri", "source_sha256", "split"),
    *("start_s", "end_s", "fps", "width_px", "height_px"),
    *(f"segments.list.element.{name}" for name in ("type", "role", "text", "image")),
    *(f"target.{name}" for name in ("kind", "num_frames", "height_px", "width_px", "fps")),
]
"""Columns of PROMPTS that training reads, beside the targets' bytes."""


@dataclass(frozen=True)
class Sample:
    """One training pair, decoded. `pixels` is uint8 `t h w 3`, as frames are stored; where it is a view of
    them, read-only. (NumPy's: each view that torch makes lets another thread take the interpreter.)
    """

    position: int
    prompt_id: str
    clip_id: str
    task: str
    prompt: Prompt
    pixels: np.ndarray
    fps: float
    original_size_px: tuple[int, int]
    encoded: EncodedPrompt | None = None
    """The prompt's tokens, if they were made beforehand."""
    latents: Tensor | None = None
    """`t c h w` float32, likewise."""
    references: References | None = None
    """The prompt's pictures that the generator sees itself; None where it sees none."""

    @property
    def video(self) -> Tensor:
        """A copy, uint8 `t c h w`."""
        return as_video(self.pixels)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one bucket. `positions` name the samples: all randomness is keyed by them."""

    positions: list[int]
    clip_ids: list[str]
    tasks: list[str]
    prompts: list[Prompt]
    video: Tensor
    """uint8 `b t c h w`."""
    fps: Tensor
    """`b` float32; inf for pictures."""
    original_size_px: Tensor
    """`b 2` float32 (height, width)."""
    encoded: Beforehand = ()
    """Prompts that were encoded beforehand. All of them are padded here, in the loader's threads: the training
    thread, which shares the interpreter with those, has nothing left to do but to move them."""
    latents: Tensor | None = None
    """`b t c h w` float32 latents that were encoded beforehand, in place of `video`."""
    references: References | None = None
    """The prompts' pictures that the generator sees itself, decoded in the loader's threads too."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def usual(self) -> dict[str, Any] | None:
        """Median frame rate and original size (height, width) of its videos; None without any."""
        moves = self.fps.isfinite()
        if not moves.any():
            return None
        size = self.original_size_px[moves].median(0).values
        return {"fps": float(self.fps[moves].median()), "original_size_px": [int(side) for side in size]}

    def pin(self) -> "Batch":
        """Page-locked copies, so that the move to the device overlaps the step."""
        names = ("video", "fps", "original_size_px", *(("latents",) if self.latents is not None else ()))
        pinned = {name: getattr(self, name).pin_memory() for name in names}
        encoded = self.encoded.pin() if isinstance(self.encoded, EncodedBatch) else self.encoded
        references = self.references.pin() if self.references else None
        return replace(self, encoded=encoded, references=references, **pinned)

    def target(self, device: torch.device) -> Tensor:
        """`b t c h w` float32 in [-1, 1] on `device`."""
        return self.video.to(device, non_blocking=True).contiguous().float() / 127.5 - 1.0


def noise_key(task: str, clip_id: str) -> int:
    """Which noise a row is given, apart from training: by what it shows, and not by its prompt's id, in which
    its job's hash has the place of its files, so that the same corpus in another folder gives the same videos.
    """
    return int(content_id("noise", task, clip_id)[:15], 16)


def collate(samples: list[Sample]) -> Batch:
    return Batch(
        positions=[s.position for s in samples],
        clip_ids=[s.clip_id for s in samples],
        tasks=[s.task for s in samples],
        prompts=[s.prompt for s in samples],
        video=_stack_frames([s.pixels for s in samples]),
        fps=torch.tensor([s.fps for s in samples], dtype=torch.float32),
        original_size_px=torch.tensor([s.original_size_px for s in samples], dtype=torch.float32),
        encoded=_pad_all([s.encoded for s in samples]),
        latents=_stack([s.latents for s in samples]),
        references=_concat([s.references for s in samples]),
    )


def as_video(pixels: np.ndarray) -> Tensor:
    """A copy, `t c h w`, of `t h w c`; of nothing, nothing."""
    video = torch.from_numpy(pixels.copy())
    return video.permute(0, 3, 1, 2) if video.ndim == 4 else video


def _stack_frames(each: list[np.ndarray]) -> Tensor:
    """`b t c h w` of `t h w c`, laid out in memory as `b t h w c`: frames are stored so, and a copy without
    reordering is four times as fast. `Batch.target` reorders, on the device.

    NumPy copies in this thread and without the GIL; torch would start threads beside the loader's own.
    """
    batch = torch.empty(len(each), *each[0].shape, dtype=torch.uint8)
    for place, pixels in zip(batch.numpy(), each, strict=True):
        np.copyto(place, pixels)
    return batch.permute(0, 1, 4, 2, 3) if batch.ndim == 5 else batch


def _pad_all(each: list[EncodedPrompt | None]) -> Beforehand:
    """One padded batch; the list itself if one is missing."""
    there = [one for one in each if one is not None]
    if not there or len(there) < len(each):
        return each
    return pad(there, there[0].tokens.shape[-1], there[0].tokens.dtype)


def _stack(each: list[Tensor | None]) -> Tensor | None:
    """A batch of them; None if one is missing."""
    there = [one for one in each if one is not None]
    return torch.stack(there) if len(there) == len(each) else None


def _concat(each: list[References | None]) -> References | None:
    """References of all; None if one has none made."""
    there = [one for one in each if one is not None]
    return concat_references(there) if there and len(there) == len(each) else None


def check_schema(found: pa.Schema, where: str) -> None:
    """Raise ConfigError unless the file has the columns of PROMPTS."""
    try:
        check_table(found, PROMPTS, where)
    except ValueError as error:
        cure = "make them again with vimi-data augment"
        raise ConfigError(str(error), legal="shards of this version", cure=cure) from None


def role_number(role: str) -> int:
    """What the model embeds: the role's place among all."""
    return list(ROLES).index(role)


def read_prompt(row: dict[str, Any]) -> Prompt:
    """The row's segments in their order, with every stored document.

    Raises:
        DataError: a role that the model doesn't know.
    """
    segments = []
    for item in row["segments"] or ():
        if item["role"] not in ROLES:
            raise DataError(f"prompt {row['prompt_id']}: role {item['role']!r}, legal: {', '.join(ROLES)}")
        segments.append(Segment(item["type"], item["role"], item["text"], item["image"]))
    return tuple(segments)
