"""A backbone and an optimizer of a user's own: nothing in the product knows them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.backbones.base import Backbone, BackboneConfig


@dataclass(frozen=True)
class ToyConfig(BackboneConfig):
    """Every pixel by itself, told by the mean of the condition."""

    dim: int = 16
    condition_dim: int = 32

    def build(self) -> "Toy":
        return Toy(self)


class Toy(Backbone):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(config.in_channels, config.dim)
        self.tell = nn.Linear(config.condition_dim, config.dim)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU()) for _ in "ab")
        self.head = nn.Linear(config.dim, config.out_channels)

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        mask: Tensor,
        z_prev: Tensor | None = None,
        keys: Tensor | None = None,
        *,
        latents_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        weights = mask[..., None] / mask.sum(dim=1)[:, None, None]
        pixels = self.embed(x.movedim(2, -1)) + self.tell((tokens * weights).sum(dim=1))[:, None, None, None]
        for block in self.blocks:
            pixels = pixels + block(pixels)
        return self.head(pixels).movedim(-1, 2), x.new_zeros(len(x), 0, 0)


TOY = ToyConfig()


def rmsprop(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
