"""Muon: the momentum of each hidden matrix, made orthogonal, is its update; AdamW moves everything else.

After Jordan et al. (2024, "Muon: an optimizer for hidden layers in neural networks"), with Moonlight's scale
(2502.16982, section 2.2) that gives an update the size of AdamW's, so that one learning rate does for both.
Not in Snap Video. Orthogonal updates move rare directions as far as common ones: a small FIT that learns 8
clips by heart for two minutes gives them back at a PSNR of 12.5 dB, and at 10.7 dB with AdamW, whose steps are
cheaper (`bench_quality overfit --minutes 2 --sampling-steps 16 --sigma-data 1 --log-mean 0.7 --optimizer ...`;
AdamW at `--lr 3e-3`).

torch's own Muon rounds to bfloat16, which a CPU without units for it multiplies far more slowly than float32,
takes matrices one by one, and knows nothing of shards; hence this one.
"""

# pyright: reportPrivateImportUsage=false

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw as adamw_update

from model.optim import GroupOptimizer, adam_moments, local_shard, parameter_groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Newton and Schulz's quintic, tuned by Jordan et al. for the steepest start; singular values end in about
[0.7, 1.2], which is as good as 1."""


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    """`... m n` matrices with their singular values brought near 1 (Newton-Schulz, quintic steps)."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y.reshape(-1, *y.shape[-2:])
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


class Muon(GroupOptimizer):
    """Groups with `hidden=True` get orthogonal updates, the others AdamW's.

    Args:
        groups: parameter groups; those of `hidden` hold matrices only.
        lr: of both.
        momentum: of the hidden matrices (Jordan et al.: 0.95, Nesterov's form).
        betas, eps: AdamW's.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "hidden": False,
        }  # fmt: skip
        super().__init__(groups, defaults)

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (self._turn if group["hidden"] else self._adamw)(group, params)

    def moments(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if not self.state[param]:
            hidden = group["hidden"]
            self.state[param] = (
                {"exp_avg": torch.zeros_like(param)} if hidden else adam_moments(param, param.device)
            )
        return self.state[param]

    def _turn(self, group: dict[str, Any], params: list[Tensor]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        grads = [local_shard(p.grad) for p in params if p.grad is not None]
        means = [local_shard(self.moments(p, group)["exp_avg"]) for p in params]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, means, momentum)
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
        states = [self.moments(p, group) for p in params]
        adamw_update(
            [local_shard(p) for p in params],
            [local_shard(p.grad) for p in params if p.grad is not None],
            [local_shard(s["exp_avg"]) for s in states],
            [local_shard(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


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


def muon(
    model: nn.Module,
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.01,
) -> Muon:
    """Muon over the matrices of `model.blocks`, AdamW over what is before and behind them."""
    blocks = getattr(model, "blocks", model)
    inside = {id(p) for p in blocks.parameters() if p.ndim == 2}
    decayed, plain = parameter_groups(model, weight_decay)
    groups = [
        {**decayed, "params": [p for p in decayed["params"] if id(p) in inside], "hidden": True},
        {**decayed, "params": [p for p in decayed["params"] if id(p) not in inside]},
        plain,
    ]
    groups = [group for group in groups if group["params"]]
    return Muon(groups, lr=lr, betas=betas, weight_decay=weight_decay)
