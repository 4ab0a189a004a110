"""One model on many devices: DDP or FSDP2, recomputation and compilation, block by block.

A `Replica` is what the loop trains: it knows how to hold gradients back during accumulation, and how to
measure and clip their norm over all ranks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import deterministic

from infra.errors import ConfigError

AUTOCAST: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
"""Arithmetic by its name; None = as the weights are stored."""


class Replica:
    """The model as this rank trains it.

    Attributes:
        model: the bare module; for FSDP2 its parameters are DTensors.
        forward: what to call in a training step (the DDP wrapper, or the module itself).
        dtype: of the arithmetic (autocast); None = as the weights are stored.
    """

    def __init__(
        self, model: Any, device: torch.device, *, mode: str, dtype: str = "float32", compiled: bool = False
    ) -> None:
        """`mode`: ddp, fsdp or hsdp; with one rank all are the same."""
        self.device, self.dtype = device, AUTOCAST[dtype]
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.is_sharded = mode != "ddp" and self.world_size > 1
        self.model = model.to(device)
        if compiled:
            model.compile_blocks()
        self.forward: nn.Module = self.model
        if self.is_sharded:
            shard(model, device, ranks_sharing(self.world_size, mode), self.dtype)
        elif self.world_size > 1:
            ids = [device.index] if device.type == "cuda" else None
            # find_unused: the self-conditioning path and "plus" references may sit out a step.
            self.forward = DistributedDataParallel(
                model, device_ids=ids, find_unused_parameters=True, gradient_as_bucket_view=True
            )

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Hold the gradients' exchange back until the last micro-batch of the step."""
        if isinstance(self.forward, DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
            return
        if self.is_sharded:
            self.model.set_requires_gradient_sync(last)
        yield

    def clip(self, max_norm: float) -> float:
        """Scale the gradients to at most `max_norm`; the norm before, over all ranks."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def average(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value


def make_deterministic(device: torch.device) -> None:
    """Let this process use only such kernels of a GPU as give the same bits for the same input.

    The backward pass of attention adds in whatever order its threads come, a compiled sum is tuned by the
    clock, and a matrix product may take another workspace: each gives other last bits after a restart.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # of torch.compile too
    deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] # for hunting bugs
    torch.backends.cudnn.benchmark = False


@contextmanager
def warning_only() -> Iterator[None]:
    """For networks that are not ours: an operation without deterministic kernel warns instead of failing."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def ranks_sharing(world_size: int, mode: str) -> int:
    """Ranks over which one copy of the model is spread.

    Raises:
        ConfigError: hsdp, and nodes that hold different numbers of ranks.
    """
    if mode != "hsdp":
        return world_size
    inner = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # set by Ray Train and torchrun
    if world_size % inner:
        raise ConfigError(
            f"parallel.mode hsdp with {world_size} workers, {inner} of them on a node",
            legal="the same number of workers on each node",
            cure="change num_workers, or take mode fsdp",
        )
    return inner


def shard(model: Any, device: torch.device, inner: int, dtype: torch.dtype | None) -> None:
    """FSDP2 over blocks, then over the rest, `inner` ranks to a copy; several copies are HSDP."""
    copies = dist.get_world_size() // inner
    shape = (copies, inner) if copies > 1 else (inner,)
    names = ("replicate", "shard") if copies > 1 else ("shard",)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if dtype is not None:  # sigma and the frame rate must stay float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def plain_name(name: str) -> str:
    """A parameter's name without what compilation puts in its middle."""
    return name.replace("_orig_mod.", "")


def pick_device() -> torch.device:
    """This rank's GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)  # NCCL and pinned copies use the current one
    return device
