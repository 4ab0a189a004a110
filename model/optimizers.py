"""The optimizers by name, and the learning rate as a function of the samples seen."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from model.muon import muon
from model.optim import GroupOptimizer, adam_moments, adamw, cosine_factor, lamb

OPTIMIZERS: dict[str, Callable[..., Any]] = {"lamb": lamb, "adamw": adamw, "muon": muon}
"""Name in a config -> maker: `maker(model, lr=..., weight_decay=...)`."""


def make_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> Optimizer:
    """The optimizer with its moments in place (zero), so that a checkpoint can fill them."""
    optimizer = OPTIMIZERS[name](model, lr=lr, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if isinstance(optimizer, GroupOptimizer):
                optimizer.moments(p, group)
            else:
                optimizer.state[p] = adam_moments(p, p.device)  # torch's AdamW makes its own at the first step
    return optimizer


def set_learning_rate(
    optimizer: Optimizer, peak: float, *, step: int, num_steps: int, warmup_steps: int
) -> float:
    """Half a cosine after a linear warm-up; the rate of step `step`, from 0."""
    rate = peak * cosine_factor(step, warmup_steps, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
