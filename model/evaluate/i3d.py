"""I3D of Kinetics-400 (Carreira and Zisserman, 1705.07750), the network of FVD (1812.01717), in torch.

The numbers are those of TF-Hub's `deepmind/i3d-kinetics-400/1`: SAME padding as TensorFlow has it, batch norm
without a scale (folded into the convolutions), logits averaged over time.

    video `b 3 t 224 224` in [-1, 1], t >= 9  ->  logits `b 400`
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CLASSES = 400
SIDE_PX = 224
MIN_FRAMES = 9
"""Fewer leave one frame before the last pooling, which takes two."""
EPSILON = 1e-3
"""Of the batch norms (Sonnet)."""
MIXED: dict[str, tuple[int, ...]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of the branches: 1x1; 1x1 before 3x3, 3x3; likewise; 1x1 behind the pooling."""
POOLS = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
"""(window, stride) of the pooling before these."""
Triple = tuple[int, int, int]


def pad_same(x: Tensor, window: Triple, stride: Triple, value: float = 0.0) -> Tensor:
    """TensorFlow's SAME: as many outputs as strides, what is missing shared out, the odd one behind."""
    padding: list[int] = []
    for size, k, s in zip(x.shape[:1:-1], window[::-1], stride[::-1], strict=True):
        lacking = max((-(-size // s) - 1) * s + k - size, 0)
        padding += [lacking // 2, lacking - lacking // 2]
    return F.pad(x, padding, value=value) if any(padding) else x


class Unit(nn.Module):
    """Convolution with its batch norm folded in, and ReLU."""

    def __init__(self, inputs: int, outputs: int, window: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, window, stride)
        self.window, self.stride = window, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(pad_same(x, self.window, self.stride)), inplace=True)


def pool(x: Tensor, window: Triple, stride: Triple) -> Tensor:
    return F.max_pool3d(pad_same(x, window, stride, -torch.inf), window, stride)


class Mixed(nn.Module):
    """Inception module: four branches side by side."""

    def __init__(self, inputs: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        one, two, three, four, five, six = channels
        self.units = nn.ModuleDict(
            {
                "Branch_0/Conv3d_0a_1x1": Unit(inputs, one, (1, 1, 1)),
                "Branch_1/Conv3d_0a_1x1": Unit(inputs, two, (1, 1, 1)),
                "Branch_1/Conv3d_0b_3x3": Unit(two, three, (3, 3, 3)),
                "Branch_2/Conv3d_0a_1x1": Unit(inputs, four, (1, 1, 1)),
                "Branch_2/Conv3d_0b_3x3": Unit(four, five, (3, 3, 3)),
                "Branch_3/Conv3d_0b_1x1": Unit(inputs, six, (1, 1, 1)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f = self.units.values()
        return torch.cat([a(x), c(b(x)), e(d(x)), f(pool(x, (3, 3, 3), (1, 1, 1)))], 1)


class I3d(nn.Module):
    """Inflated Inception-V1; see the module's first lines."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict(
            {
                "Conv3d_1a_7x7": Unit(3, 64, (7, 7, 7), (2, 2, 2)),
                "Conv3d_2b_1x1": Unit(64, 64, (1, 1, 1)),
                "Conv3d_2c_3x3": Unit(64, 192, (3, 3, 3)),
            }
        )
        self.mixed, inputs = nn.ModuleDict(), 192
        for name, channels in MIXED.items():
            self.mixed[name] = Mixed(inputs, channels)
            inputs = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = nn.Linear(inputs, NUM_CLASSES)

    def forward(self, video: Tensor) -> Tensor:
        """`b 3 t 224 224` in [-1, 1] -> logits `b 400`."""
        first, second, third = self.stem.values()
        x = third(second(pool(first(video), (1, 3, 3), (1, 2, 2))))
        for name, block in self.mixed.items():
            x = block(pool(x, *POOLS[name]) if name in POOLS else x)
        x = F.avg_pool3d(x, (2, 7, 7), 1)[..., 0, 0]
        return self.logits(x.transpose(1, 2)).mean(1)


def convert(variables: Mapping[str, Any]) -> I3d:
    """I3D with the weights of a Flax checkpoint: `params` and `batch_stats`, by the names of TF-Hub's.

    Raises:
        KeyError: a layer is missing.
        RuntimeError: one has another shape.
    """
    params, stats = variables["params"], variables["batch_stats"]
    model = I3d()
    units = dict(model.stem.items())
    for name, block in model.mixed.items():
        assert isinstance(block, Mixed)
        units |= {f"{name} {unit}": part for unit, part in block.units.items()}
    state: dict[str, Tensor] = {}
    paths = {module: path for path, module in model.named_modules()}
    for name, unit in units.items():
        kernel, bias = folded(_below(params, name), _below(stats, name))
        state |= {f"{paths[unit]}.conv.weight": kernel, f"{paths[unit]}.conv.bias": bias}
    last = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
    state |= {"logits.weight": _tensor(last["kernel"][0, 0, 0].T), "logits.bias": _tensor(last["bias"])}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _below(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    for key in name.split():
        tree = tree[key]
    return tree


def folded(params: Mapping[str, Any], stats: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Kernel `o i t h w` and bias of a convolution and the batch norm behind it, folded in float64."""
    kernel = np.asarray(params["Conv_0"]["kernel"], np.float64).transpose(4, 3, 0, 1, 2)
    norm = {**stats["BatchNorm_0"], **params["BatchNorm_0"]}
    mean, var, shift = (np.asarray(norm[name], np.float64).ravel() for name in ("mean", "var", "bias"))
    scale = 1 / np.sqrt(var + EPSILON)
    bias = shift - mean * scale
    return _tensor(kernel * scale[:, None, None, None, None]), _tensor(bias)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
