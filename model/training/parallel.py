"""One model on many devices: DDP or FSDP2, recomputation and compilation, block by block.

A `Replica` is what the loop trains: it knows how to hold gradients back during accumulation, and how to
measure and clip their norm over all ranks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import deterministic

from infra.config import Config


class ParallelConfig(Config):
    """How the model is spread over the ranks; none of it changes the order of samples."""

    mode: Literal["ddp", "fsdp"] = "ddp"
    """ddp: a whole copy on each rank. fsdp: FSDP2, parameters and optimizer sharded."""
    replicas: int = Field(default=1, ge=1)
    """fsdp only: hybrid sharding over `replicas` groups (typically the nodes); 1 = one shard group."""
    recompute: bool = False
    """Drop the blocks' activations and compute them again in the backward pass: memory for time."""
    compile: bool = False
    """Compile each block (torch.compile); pays on GPUs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of forward and backward; weights, optimizer and EMA stay float32."""
    deterministic: bool = True
    """On a GPU, only kernels that add in the same order each time, so that an interrupted run ends like an
    unbroken one there too, to the last bit (a CPU's kernels do so anyway). False leaves the choice to torch:
    a step of `fit-500m` on an H200 is then 5 % faster (`bench_mfu`)."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Replica:
    """The model as this rank trains it.

    Attributes:
        model: the bare module; for FSDP2 its parameters are DTensors.
        forward: what to call in a training step (the DDP wrapper, or the module itself).
    """

    def __init__(self, model: Any, config: ParallelConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.model = model.to(device)
        if config.compile:
            model.compile_blocks()
        self.forward: nn.Module = self.model
        if self.world_size > 1 and config.mode == "fsdp":
            shard(model, config, device, self.world_size)
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
        if self.config.mode == "fsdp" and self.world_size > 1:
            self.model.set_requires_gradient_sync(last)
        yield

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.config.dtype == "float32" else DTYPES[self.config.dtype]

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


def shard(model: Any, config: ParallelConfig, device: torch.device, world_size: int) -> None:
    """FSDP2 over blocks, then over the rest; `replicas` > 1 is hybrid sharding (HSDP)."""
    inner = world_size // config.replicas
    shape = (config.replicas, inner) if config.replicas > 1 else (world_size,)
    names = ("replicate", "shard") if config.replicas > 1 else ("shard",)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dtype = DTYPES[config.dtype]
    policy = (
        MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # sigma and the frame rate must stay float32
        )
        if dtype is not torch.float32
        else MixedPrecisionPolicy()
    )
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
