"""A gradient that is not finite ends a run before the optimizer moves, and the samples to blame are named."""

import torch.distributed as dist
from torch import Tensor

from infra.errors import TrainingError
from model.data.loader import Loader

MOST_NAMES = 8


class NonFiniteError(TrainingError):
    """A non-finite gradient: known on all ranks at the same step, and the same on every further try."""


def blame(loader: Loader, norm: float, each: Tensor, positions: list[int], *, at: int) -> NonFiniteError:
    """The error to raise; all ranks call this alike.

    Args:
        loader: knows the prompts by position.
        norm: of the gradient, over all ranks.
        each: losses of this rank's samples.
        positions: theirs, in the same order.
        at: samples seen before this step.
    """
    found = [[p for p, ok in zip(positions, each.isfinite().tolist(), strict=True) if not ok]]
    if dist.is_initialized() and dist.get_world_size() > 1:
        mine, found = found[0], [[]] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    places = sorted(p for part in found for p in part)[:MOST_NAMES]
    names = [loader.read(p).prompt_id for p in places]
    return NonFiniteError(
        f"step at {at:,} samples: gradient norm is {norm}; "
        f"samples with a non-finite loss: {', '.join(names) or 'none'}"
    )
