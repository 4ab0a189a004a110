"""Optimizers and the learning rate's schedule: LAMB as Snap Video, AdamW as everyone.

All work on plain tensors and on the sharded parameters of FSDP2 (`DTensor`): arithmetic is done on
each rank's own shard, and only LAMB's norms cross ranks, in one all-reduce a step. Averages of the
weights are in `model.ema`.
"""

# pyright: reportPrivateImportUsage=false

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class GroupOptimizer(Optimizer, ABC):
    """An optimizer that moves a group of parameters at once; the subclass says how, and what it remembers."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(group, params)
        return loss

    @abstractmethod
    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move these parameters of the group, all of which have gradients."""

    @abstractmethod
    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What is remembered of a parameter; zero at first, so that a checkpoint can fill it."""


def adam_moments(param: Tensor, step_device: torch.device | str) -> dict[str, Tensor]:
    """Adam's two moments and its count of steps, all zero."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=step_device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


class Lamb(GroupOptimizer):
    """LAMB (You et al., 1904.00962, algorithm 2): Adam with a trust ratio per tensor.

    Snap Video trains with lr 5e-3, betas (0.9, 0.99), weight decay 0.01. As in the authors' code,
    tensors that are not decayed (norms, biases, embeddings) are not rescaled either: groups with
    `adapt=False`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        states = [self.moments(p, group) for p in params]
        grads = [local_shard(p.grad) for p in params if p.grad is not None]
        means = [local_shard(s["exp_avg"]) for s in states]
        squares = [local_shard(s["exp_avg_sq"]) for s in states]
        torch._foreach_add_([s["step"] for s in states], 1)
        count = int(states[0]["step"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        # m / bias1 / (sqrt(v / bias2) + eps), with the divisors multiplied out: fewer passes over memory
        bias1, bias2 = 1 - beta1**count, 1 - beta2**count
        roots = torch._foreach_sqrt(squares)
        torch._foreach_mul_(roots, bias1 / math.sqrt(bias2))
        torch._foreach_add_(roots, group["eps"] * bias1)
        updates = list(torch._foreach_div(means, roots))
        shards = [local_shard(p) for p in params]
        if group["weight_decay"]:
            torch._foreach_add_(updates, shards, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(updates, list(_trust_ratios(params, shards, updates).unbind()))
        torch._foreach_add_(shards, updates, alpha=-group["lr"])

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if not self.state[param]:
            self.state[param] = adam_moments(param, "cpu")  # the count is read in Python
        return self.state[param]


def _trust_ratios(params: list[Tensor], shards: list[Tensor], updates: list[Tensor]) -> Tensor:
    """|p| / |update| per tensor, 1 where either is zero; norms are over all shards."""
    norms = torch._foreach_norm([s.float() for s in shards] + [u.float() for u in updates])
    squares = torch.stack(list(norms)).square().view(2, len(params))
    first = params[0]
    if isinstance(first, DTensor):
        for dim, placement in enumerate(first.placements):
            if placement.is_shard():
                group = first.device_mesh.get_group(dim)
                torch.distributed.all_reduce(squares, group=group)
    weights, lengths = squares.sqrt().unbind()
    usable = (weights > 0) & (lengths > 0)
    return torch.where(usable, weights / lengths.clamp(min=1e-30), 1.0)


def local_shard(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; a plain tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed (and rescaled by LAMB); norms, biases and embedding tables are not."""
    tables = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    named = {"time", "row", "column", "latents", "table"}
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_table = id(p) in tables or name.rsplit(".", 1)[-1] in named
            (plain if p.ndim < 2 or is_table else decayed).append(p)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def lamb(
    model: nn.Module,
    *,
    lr: float = 5e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.01,
) -> Lamb:
    """Snap Video's optimizer (section 4.1)."""
    decayed, plain = parameter_groups(model, weight_decay)
    return Lamb([decayed, {**plain, "adapt": False}], lr=lr, betas=betas, weight_decay=weight_decay)


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.01,
) -> torch.optim.AdamW:
    """AdamW over the same two groups; Snap Video's U-Net baselines take Adam at 1e-4."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, fused=True)


def cosine_schedule(
    optimizer: Optimizer, *, warmup_steps: int, total_steps: int, floor_frac: float = 0.0
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `floor_frac` of the learning rate.

    Snap Video: 10,000 steps of warm-up, 550,000 in all.
    """
    return LambdaLR(optimizer, lambda step: cosine_factor(step, warmup_steps, total_steps, floor_frac))


def cosine_factor(step: int, warmup_steps: int, total_steps: int, floor_frac: float = 0.0) -> float:
    """Share of the learning rate at `step` (from 0); the first step of a warm-up is not zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor_frac + (1 - floor_frac) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
