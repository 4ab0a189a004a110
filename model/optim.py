"""Optimizers by name (LAMB as Snap Video, AdamW, Muon) and the learning rate's schedule.

All work on plain tensors and on the sharded parameters of FSDP2 (`DTensor`): arithmetic is done on
each rank's own shard; LAMB's norms cross ranks, in one all-reduce a step, and Muon's matrices.
A new optimizer is a constructor in `OPTIMIZERS`, or one outside of this project that is named by its
import path, `package.module:function`. Averages of the weights are in `model.ema`.
"""

# pyright: reportPrivateImportUsage=false

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.adamw import adamw as adamw_update

from model.registry import named

BETAS = (0.9, 0.99)
"""Snap Video's (section 4.1)."""


class GroupOptimizer(Optimizer, ABC):
    """An optimizer that moves a group of parameters at once; the subclass says how."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; there is no closure to evaluate."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(group, params)

    @abstractmethod
    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move these parameters of the group, all of which have gradients."""


def adam_moments(optimizer: Optimizer, param: Tensor, *, step_device: torch.device | str) -> dict[str, Tensor]:
    """Adam's two moments of a parameter and its count of steps, zero at first."""
    if not optimizer.state[param]:
        optimizer.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=step_device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
    return optimizer.state[param]


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
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        shared = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True}
        super().__init__(params, shared)

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        states = [adam_moments(self, p, step_device="cpu") for p in params]  # the count is read in Python
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
    positions = {"time", "row", "column", "latents", "table"}
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_table = id(p) in tables or name.rsplit(".", 1)[-1] in positions
            (plain if p.ndim < 2 or is_table else decayed).append(p)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Newton and Schulz's quintic, tuned by Jordan et al. for the steepest start; singular values end in about
[0.7, 1.2], which is as good as 1."""

MOMENTUM = 0.95
"""Of the hidden matrices, in Nesterov's form (Jordan et al.)."""


def orthogonalized(x: Tensor) -> Tensor:
    """`... m n` matrices with their singular values brought near 1 (Newton-Schulz, five quintic steps)."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y.reshape(-1, *y.shape[-2:])
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


class Muon(GroupOptimizer):
    """The momentum of each hidden matrix, made orthogonal, is its update; AdamW moves everything else.

    After Jordan et al. (2024, "Muon: an optimizer for hidden layers in neural networks"), with Moonlight's
    scale (2502.16982, section 2.2) that gives an update the size of AdamW's, so that one learning rate does
    for both. Not in Snap Video. Orthogonal updates move rare directions as far as common ones: small models
    learn sooner (`bench_quality overfit --optimizer ...`: 12.5 dB after two minutes, AdamW 10.7 dB).

    torch's own Muon rounds to bfloat16 and so depends on the sharding: four updates on two ranks differ by
    2 % from those on one. It takes matrices only, one by one; hence this one.

    Args:
        groups: parameter groups; those with `hidden=True` hold matrices only and get orthogonal updates.
        lr, weight_decay: of both, decoupled.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "hidden": False})

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (self._turn if group["hidden"] else self._adamw)(group, params)

    def _momentum(self, param: Tensor) -> Tensor:
        if not self.state[param]:
            self.state[param] = {"exp_avg": torch.zeros_like(param)}
        return self.state[param]["exp_avg"]

    def _turn(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr = group["lr"]
        grads = [local_shard(p.grad) for p in params if p.grad is not None]
        means = [local_shard(self._momentum(p)) for p in params]
        torch._foreach_lerp_(means, grads, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(grads, means, MOMENTUM)
        whole = [_whole(p, update) for p, update in zip(params, ahead, strict=True)]
        torch._foreach_mul_([local_shard(p) for p in params], 1 - lr * group["weight_decay"])
        # Matrices of one shape in one product: a small model has dozens, each too small for a processor.
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, update in enumerate(whole):
            alike.setdefault(tuple(sorted(update.shape)), []).append(number)
        for (_, longer), numbers in alike.items():
            stack = torch.stack([_wide(whole[n]) for n in numbers])
            turned = orthogonalized(stack.bfloat16() if stack.is_cuda else stack)
            size = 0.2 * longer**0.5  # Moonlight: the root mean square of AdamW's updates
            for n, update in zip(numbers, turned.to(stack.dtype), strict=True):
                update = update.mT if whole[n].shape[0] > whole[n].shape[1] else update
                local_shard(params[n]).add_(_own_part(params[n], update), alpha=-lr * size)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [adam_moments(self, p, step_device=p.device) for p in params]
        adamw_update(
            [local_shard(p) for p in params],
            [local_shard(p.grad) for p in params if p.grad is not None],
            [local_shard(s["exp_avg"]) for s in states],
            [local_shard(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=True, amsgrad=False, maximize=False, beta1=BETAS[0], beta2=BETAS[1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8,
        )  # fmt: skip


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[0] > x.shape[1] else x


def _whole(param: Tensor, local: Tensor) -> Tensor:
    """The whole matrix of which this rank has `local`; gathered from all ranks where it is sharded."""
    if not isinstance(param, DTensor):
        return local
    shape, stride = param.shape, param.stride()
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def _own_part(param: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a matrix that every rank has."""
    if not isinstance(param, DTensor):
        return whole
    everywhere = [Replicate()] * param.device_mesh.ndim
    copy = DTensor.from_local(whole.contiguous(), param.device_mesh, everywhere, run_check=False)
    return copy.redistribute(placements=param.placements).to_local()


def lamb(model: nn.Module, *, lr: float = 5e-3, weight_decay: float = 0.01) -> Optimizer:
    """Snap Video's optimizer (section 4.1)."""
    decayed, plain = parameter_groups(model, weight_decay)
    return Lamb([decayed, {**plain, "adapt": False}], lr=lr, weight_decay=weight_decay)


def adamw(model: nn.Module, *, lr: float = 1e-4, weight_decay: float = 0.01) -> Optimizer:
    """AdamW over the same two groups; Snap Video's U-Net baselines take Adam at 1e-4."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=BETAS, fused=True)


def muon(model: nn.Module, *, lr: float = 3e-3, weight_decay: float = 0.01) -> Optimizer:
    """Muon over the matrices of `model.blocks`, AdamW over what is before and behind them."""
    inside = {id(p) for p in getattr(model, "blocks", model).parameters() if p.ndim == 2}
    decayed, plain = parameter_groups(model, weight_decay)
    hidden = [p for p in decayed["params"] if id(p) in inside]
    others = [p for p in decayed["params"] if id(p) not in inside]
    groups = [{**decayed, "params": hidden, "hidden": True}, {**decayed, "params": others}, plain]
    return Muon([g for g in groups if g["params"]], lr=lr, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"lamb": lamb, "adamw": adamw, "muon": muon}
"""Each takes `(model, *, lr, weight_decay)`; every tensor of its state must start at zero."""


def make_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> Optimizer:
    """The named optimizer with its state in place (zero), so that a checkpoint can fill it.

    Raises:
        ValueError: no such optimizer.
    """
    optimizer = named(OPTIMIZERS, name)(model, lr=lr, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a step that moves nothing makes the state, whatever the optimizer's kind
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


def cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the learning rate at `step` (from 0); the first step of a warm-up is not zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_learning_rate(
    optimizer: Optimizer, peak: float, *, step: int, num_steps: int, warmup_steps: int
) -> float:
    """Half a cosine after a linear warm-up; the rate of step `step`, from 0."""
    rate = peak * cosine_factor(step, warmup_steps, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
