"""The backbone interface: a config that builds the network, and the network that denoises one video.

A new backbone is one file: a `BackboneConfig` that builds a `Backbone`. It is chosen by a name of
`model.backbones.presets`, or from outside by the import path of its config, `package.module:CONFIG`.
Nothing else needs to know it: parameters, FLOPs and memory are counted on the network (`model.cost`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from model.condition import ConditionConfig


@dataclass(frozen=True)
class BackboneConfig(ABC):
    """The sizes that every backbone has.

    Attributes:
        num_frames, height_px, width_px: of the video (or of its latents); smaller clips in time fit, and
            other sizes.
        in_channels, out_channels: 3 for pixels; the upsampler's input also carries the small video.
        condition_dim: width of the condition tokens.
        checkpoint: recompute each block in the backward pass.
    """

    num_frames: int = 16
    height_px: int = 36
    width_px: int = 64
    in_channels: int = 3
    out_channels: int = 3
    condition_dim: int = 768
    checkpoint: bool = False

    @property
    def is_upsampler(self) -> bool:
        """The input carries the small video beside the noisy one."""
        return self.in_channels > self.out_channels

    @abstractmethod
    def build(self) -> "Backbone":
        """The network, freshly drawn."""

    def own_generator(self, condition: "ConditionConfig") -> Any:
        """A generator of its own kind, freshly drawn; None = the one of `model.generator`."""
        return None

    def tokens(self) -> dict[str, int]:
        """Lengths of the sequences that one video becomes, by name, for `vimi-train describe`."""
        return {}


class Backbone(nn.Module, ABC):
    """What the generator calls.

    Attributes:
        embed: takes in the video's channels; an upsampler's starts from the base model's.
        blocks: the units of sharding, recomputation and compilation.
    """

    embed: nn.Linear
    blocks: nn.ModuleList

    @property
    def z_shape(self) -> tuple[int, int]:
        """Shape of one sample's latents, which later evaluations are conditioned on; no latents here."""
        return 0, 0

    @abstractmethod
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
        """One evaluation.

        Args:
            x: `b t c h w` scaled noisy video, t up to `num_frames`; h and w are the config's, or those of
                another bucket.
            tokens: `b k condition_dim` condition tokens.
            mask: `b k` bool, True where the token is real.
            z_prev: `b m d` latents of an earlier evaluation; None equals zeros.
            keys: `b` int64 dropout keys; None switches dropout off.
            latents_only: the answer is not wanted and may come back empty; never asked of a backbone
                without latents.

        Returns:
            `b t out_channels h w` answer F, and the `b m d` latents after the last block.
        """
