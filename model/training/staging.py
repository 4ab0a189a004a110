"""Copies of a run's state for its checkpoints: on the CPU, in the same memory each time.

From a GPU they are made by a stream of their own into page-locked memory, while the next passes run, which only
read the state; what would change it is put behind them in the device's own queue, so the processor waits for
nothing. (torch's stager locks the pages of a tensor that is made anew, as the random state is, once more at
each save, which fails at the second one.)
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.optim import local_shard


class Staging:
    """Memory for one copy of a state, made at the first one (or by `prepare`)."""

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}
        self.stream: torch.cuda.Stream | None = None
        self.finished: torch.cuda.Event | None = None

    def prepare(self, state: dict[str, Tensor]) -> None:
        """Make the memory beforehand: to lock its pages would hold the first save up."""
        for name, value in state.items():
            if name not in self.copies:
                self.copies[name] = room_for(value)

    def copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy, or on a GPU begin to; the tensors are whole after `wait`, and the next call reuses them."""
        self.prepare(state)
        on_gpu = any(value.is_cuda for value in state.values())
        if not on_gpu:
            self._enqueue(state)
        else:
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())  # the optimizer's last step comes first
            with torch.cuda.stream(self.stream):
                self._enqueue(state)
                self.finished = torch.cuda.Event(blocking=True)  # a thread waits for it
                self.finished.record()
        return {name: self.copies[name] for name in state}

    def _enqueue(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            source = local_shard(value).detach()
            local_shard(self.copies[name]).copy_(source, non_blocking=True)
            if self.stream is not None and source.is_cuda:
                source.record_stream(self.stream)

    def wait(self) -> None:
        """Until the copies are whole; any thread may ask."""
        if self.finished is not None:
            self.finished.synchronize()

    def let_change(self) -> None:
        """What this thread asks of the GPU from now on happens after the copies; it doesn't wait itself."""
        if self.finished is not None:
            torch.cuda.current_stream().wait_event(self.finished)


def room_for(value: Tensor) -> Tensor:
    """An empty tensor of the same shape on the CPU, page-locked for a GPU's; of a sharded one, a like shard."""
    if isinstance(value, DTensor):
        shard = value.detach().to("cpu", copy=True)
        setattr(shard, "_local_tensor", room_for(value.to_local()))  # noqa: B010 - torch's own way
        return shard
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
