"""The frozen networks that give the metrics their features, by name."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from infra.clip import Clip, check_clip, load_clip
from infra.errors import DataError, first_line
from infra.pretrained import exactly
from model.evaluate.face import FaceNetwork
from model.evaluate.i3d import MIN_FRAMES, SIDE_PX, I3d, convert
from model.evaluate.network import FileNetwork, Network, NetworkConfig, load_script
from model.evaluate.subject import DinoNetwork, SubjectNetwork
from model.evaluate.weights import i3d_bytes, read_arrays

__all__ = ["NETWORKS", "Network", "NetworkConfig", "network_of", "opener", "resize", "squeeze"]


class Motion(Network):
    """Mean absolute difference of neighbouring frames, `t - 1`, as a share of the range. No weights."""

    name = "motion"

    @classmethod
    def find(cls, config: NetworkConfig) -> str:
        return "no weights"

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "what": "mean |difference| / 255 of neighbouring frames at their own size"}

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        return np.array([np.abs(a.astype(np.int16) - b).mean() / 255 for a, b in pairwise(frames)], np.float32)


class I3dNetwork(Network):
    """Logits of I3D on Kinetics-400, `400`."""

    name = "i3d"
    min_frames = MIN_FRAMES

    @classmethod
    def find(cls, config: NetworkConfig) -> str:
        return f"I3D of {i3d_bytes(config.i3d)[1]}"

    @cached_property
    def weights(self) -> tuple[I3d, str]:
        from hashlib import sha256

        data, _ = i3d_bytes(self.config.i3d)
        try:
            model = convert(read_arrays(data, "I3D's checkpoint"))
        except (KeyError, RuntimeError, ValueError) as error:
            raise DataError(
                f"I3D's checkpoint lacks a layer or has another shape: {first_line(error)}"
            ) from None
        return model.to(self.device), sha256(data).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        how = {"resize": self.config.resize, "crop": self.config.crop, "side_px": SIDE_PX, "range": [-1, 1]}
        return {"name": "i3d-kinetics-400", "sha256": self.weights[1], "features": "logits", **how}

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        video = squeeze(frames, (SIDE_PX, SIDE_PX), self.config, self.device)
        # Channels last would be a fifth faster on a CPU, and its sums ten times as rough.
        with exactly():
            out = self.weights[0]((video / 127.5 - 1).contiguous())
        return out[0].float().cpu().numpy()


def squeeze(
    frames: np.ndarray, size_px: tuple[int, int], config: NetworkConfig, device: torch.device
) -> Tensor:
    """Frames uint8 `t h w 3` -> float32 `1 3 t h w` in 0..255 at this (height, width)."""
    if config.crop == "center":
        side = min(frames.shape[1:3])
        top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
        frames = frames[:, top : top + side, left : left + side]
    pixels = (torch.from_numpy(frame.copy()).to(device) for frame in frames)
    small = [resize(picture.permute(2, 0, 1).float(), size_px, config.resize) for picture in pixels]
    return torch.stack(small, 1)[None]


def resize(picture: Tensor, size_px: tuple[int, int], how: str) -> Tensor:
    """`c h w` at another (height, width); what has one colour keeps it to the last bit."""
    if how == "antialias":
        return F.interpolate(picture[None], size=size_px, mode="bilinear", antialias=True)[0]
    for axis, size in zip((1, 2), size_px, strict=True):
        picture = _blend(picture, size, axis, 0.5 if how == "bilinear" else 0.0)
    return picture


def _blend(x: Tensor, size: int, axis: int, centre: float) -> Tensor:
    """Linear interpolation along an axis; pixels lie at their number plus `centre`."""
    found = x.shape[axis]
    if found == size:
        return x
    at = ((torch.arange(size, dtype=torch.float64) + centre) * (found / size) - centre).clamp(0, found - 1)
    low = at.long()
    weight = (at - low).to(x).view(-1, *[1] * (x.ndim - 1 - axis))
    one, two = (x.index_select(axis, place.to(x.device)) for place in (low, (low + 1).clamp(max=found - 1)))
    return one + (two - one) * weight


class ClipNetwork(Network):
    """Unit vectors of frames, `t d`, of texts and of pictures, by any open_clip model or the offline one."""

    name = "clip"

    @classmethod
    def find(cls, config: NetworkConfig) -> str:
        check_clip(config.clip)
        return f"CLIP {config.clip.name}"

    @cached_property
    def clip(self) -> Clip:
        return load_clip(self.config.clip, self.device)

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.clip.identity, "precision": "bf16" if self.clip.uses_bf16 else "fp32"}

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        return self.clip.encode_images(list(frames))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.concatenate([self.clip.encode_texts([text]) for text in texts])


class InceptionNetwork(FileNetwork):
    """Pooled features of FID's Inception, `t 2048`."""

    name = field = "inception"
    file = "pt_inception-2015-12-05-6726825d.pth of pytorch-fid's releases"

    @cached_property
    def model(self) -> torch.nn.Module:
        from model.evaluate.inception import FidInception

        return self.tensors(FidInception())

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "features": "pool 2048", "resize": "bilinear 299", "range": [-1, 1]}

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        out = []
        for frame in frames:
            small = squeeze(frame[None], (299, 299), NetworkConfig(), self.device)[:, :, 0]
            with exactly():
                out.append(self.model(small / 127.5 - 1)[0].float().cpu().numpy())
        return np.stack(out)


class C3dNetwork(FileNetwork):
    """Logits (or log-probabilities) of a C3D classifier, `classes`."""

    name = field = "c3d"
    file = "a C3D of UCF101 as TorchScript, such as StyleGAN-V's c3d_ucf101.pt"
    SIZE_PX, CROP_PX = (128, 171), 112

    @cached_property
    def model(self) -> Any:
        return load_script(self.path, self.device, self.file)

    @property
    def identity(self) -> dict[str, Any]:
        how = {
            "size_px": [*self.SIZE_PX],
            "crop_px": self.CROP_PX,
            "resize": self.config.resize,
            "range": [0, 255],
        }
        return {**super().identity, **how}

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        video = squeeze(frames, self.SIZE_PX, self.config.model_copy(update={"crop": "none"}), self.device)
        top, left = ((side - self.CROP_PX) // 2 for side in self.SIZE_PX)
        video = video[..., top : top + self.CROP_PX, left : left + self.CROP_PX].contiguous()
        with exactly():
            out = self.model(video)[0].double().cpu().numpy()
        is_probability = (out >= 0).all() and abs(out.sum() - 1) < 1e-3
        return (np.log(out.clip(1e-30)) if is_probability else out).astype(np.float32)


class RaftNetwork(FileNetwork):
    """For each pair of frames the mean of the 5 % longest flows, as a share of the shorter side: `t - 1`."""

    name = field = "raft"
    file = "raft_large_C_T_SKHT_V2-ff5fadd5.pth of torchvision's model downloads"
    TOP_FRAC = 0.05

    @cached_property
    def model(self) -> torch.nn.Module:
        from torchvision.models.optical_flow import raft_large

        return self.tensors(raft_large(weights=None))

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "top_frac": self.TOP_FRAC, "updates": 12, "multiple_px": 8}

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        height, width = (max(128, side // 8 * 8) for side in frames.shape[1:3])  # RAFT's pyramid wants 128
        scaled = NetworkConfig(resize="antialias")
        video = squeeze(frames, (height, width), scaled, self.device)[0].transpose(0, 1) / 127.5 - 1
        found = []
        for one, two in pairwise(video):
            with exactly():
                flow = self.model(one[None], two[None])[-1][0]
            lengths = flow.norm(dim=0).flatten().sort(descending=True).values
            top = lengths[: max(1, round(self.TOP_FRAC * len(lengths)))]
            found.append(float(top.mean()) / min(height, width))
        return np.array(found, np.float32)


NETWORKS: dict[str, type[Network]] = {
    network.name: network
    for network in (
        *(Motion, I3dNetwork, ClipNetwork, DinoNetwork, InceptionNetwork, C3dNetwork, RaftNetwork),
        SubjectNetwork,
        FaceNetwork,
    )
}


def network_of(feature: str) -> str:
    """The network behind a feature of a prompt: `clip_text` and `clip_references` are CLIP's."""
    return feature.removesuffix("_text").removesuffix("_references")


OpenNetwork = Callable[[str], Network]


def opener(config: NetworkConfig, device: torch.device) -> OpenNetwork:
    """Gives each network by name, made once."""
    made: dict[str, Network] = {}

    def open_network(name: str) -> Network:
        if name not in made:
            made[name] = NETWORKS[name](config, device)
        return made[name]

    return open_network
