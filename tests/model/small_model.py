"""A model of three layers and a task for it: what optimizers and averages are tried on."""

import torch
from torch import nn
from torch.optim import Optimizer


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def train_small(model: nn.Module, optimizer: Optimizer, steps: int, seed: int = 0) -> list[float]:
    g = torch.Generator().manual_seed(seed)
    x, y, out = torch.randn(32, 6, generator=g), torch.randn(32, 4, generator=g), []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out
