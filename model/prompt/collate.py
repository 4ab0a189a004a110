"""Prompts that went through a processor one by one -> batches of like length for the model."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processed:
    """One prompt, ready for the model."""

    inputs: dict[str, Tensor]
    """As the processor gives them, batch of one."""
    kept: Tensor
    """Positions of the tokens that belong to segments, `l`."""
    role: Tensor
    segment: Tensor

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def has_pictures(self) -> bool:
        return "pixel_values" in self.inputs


def collate(batch: list[Processed], pad_id: int) -> dict[str, Tensor]:
    """Processor outputs of single prompts -> one batch, as the processor itself would make it.

    Token tensors are right padded. Picture tensors are concatenated along the first dimension, which is
    pictures (LLaVA), patches (Qwen-VL) or prompts (SmolVLM); other dimensions are zero padded.
    """
    longest = max(one.length for one in batch)
    out = {}
    for name in batch[0].inputs:
        values = [one.inputs[name] for one in batch]
        if values[0].shape[:2] == (1, batch[0].length):
            fill = pad_id if name == "input_ids" else 0
            values = [torch.nn.functional.pad(v, (0, longest - v.shape[1]), value=fill) for v in values]
        else:
            values = _pad_alike(values)
        out[name] = torch.cat(values)
    return out


def _pad_alike(values: list[Tensor]) -> list[Tensor]:
    """Zero pad all dimensions but the first to the largest."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [have - got for have, got in zip(shape, value.shape[1:], strict=True)]
        sides = [side for gap in reversed(missing) for side in (0, gap)]
        padded.append(torch.nn.functional.pad(value, sides))
    return padded


def batches_of(ready: list[Processed], size: int) -> list[list[int]]:
    """Rows in batches of like length; prompts with and without pictures apart, empty ones too."""
    order = sorted(range(len(ready)), key=lambda n: (ready[n].has_pictures, ready[n].length, n))
    batches: list[list[int]] = []
    for row in order:
        kind = (ready[row].has_pictures, ready[row].length > 0)
        last = batches[-1] if batches else None
        if last and len(last) < size and kind == (ready[last[0]].has_pictures, ready[last[0]].length > 0):
            last.append(row)
        else:
            batches.append([row])
    return batches
