"""Filters by motion (frame difference) and picture quality (sharpness, an aesthetic head).

Motion and sharpness need no weights. An aesthetic head is the user's: a linear layer or a TorchScript over
the vectors of a CLIP, as LAION's predictors are.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from infra.clip import ClipConfig, check_clip, load_clip
from infra.config import Config, Incidental, NameOrFile
from infra.errors import ConfigError, first_line
from infra.pictures import fit_inside

STEP_S = 0.1
"""Time between the two frames of which motion is the difference. Ours."""
CLOSE_PX = 512
"""Longer side at which a picture's sharpness is measured; smaller ones stay as they are. Ours."""


class AestheticConfig(Config):
    """A head that scores pictures, and the CLIP whose vectors it reads."""

    head: Incidental[NameOrFile]
    """File with `weight` `1 d` and `bias` `1` (LAION's linear predictors), or a TorchScript: unit vectors
    float32 `n d` -> scores `n`. What it holds decides the output, not where it lies."""
    clip: ClipConfig = ClipConfig(name="ViT-L-14", pretrained="openai")
    """LAION's predictors read this one."""
    min_score: float = 5.0
    """Least score of the middle frame. Ours; UNIMO-G keeps what is above 6.5 on LAION's scale."""


class QualityConfig(Config):
    """Bounds of motion and picture quality; null switches a filter off, and all are off by default."""

    min_motion: float | None = Field(default=None, ge=0, le=255)
    """Least motion: mean difference of two frames 0.1 s apart, in grey levels of 64x64 pixels, where the clip
    moves most. 0.5 leaves out what barely moves; a hand-held camera makes about 2. Ours."""
    max_motion: float | None = Field(default=None, ge=0, le=255)
    """Most motion, likewise: above about 30 lie cuts and flashes. Ours."""
    min_sharpness: float | None = Field(default=None, ge=0)
    """Least variance of the Laplacian of the middle frame, grey levels squared, longer side at most 512 px:
    below about 50 pictures look blurred. Ours."""
    aesthetic: AestheticConfig | None = None
    """Least score of the middle frame by a head of your own."""

    @property
    def asks_motion(self) -> bool:
        return self.min_motion is not None or self.max_motion is not None

    @property
    def asks_picture(self) -> bool:
        return self.min_sharpness is not None or self.aesthetic is not None


def check_quality(config: QualityConfig) -> None:
    """Refuse a head or CLIP that isn't there or don't fit.

    Raises:
        ConfigError: says which.
    """
    if config.aesthetic is not None:
        check_clip(config.aesthetic.clip)
        _load_head(config.aesthetic.head)


def judge_motion(pairs: np.ndarray, config: QualityConfig) -> str | None:
    """Why a clip moves too little or too much; `pairs` uint8 `n 2 h w 3`."""
    motion = largest_motion(pairs)
    if config.min_motion is not None and motion < config.min_motion:
        return f"motion {motion:.2f} < {config.min_motion:g}"
    if config.max_motion is not None and motion > config.max_motion:
        return f"motion {motion:.2f} > {config.max_motion:g}"
    return None


def judge_picture(picture: Image.Image, config: QualityConfig) -> str | None:
    """Why a picture is not good enough."""
    if config.min_sharpness is not None:
        found = sharpness(picture)
        if found < config.min_sharpness:
            return f"sharpness {found:.1f} < {config.min_sharpness:g}"
    if config.aesthetic is not None:
        score = aesthetic_score(picture, config.aesthetic)
        if not score >= config.aesthetic.min_score:
            return f"aesthetic score {score:.2f} < {config.aesthetic.min_score:g}"
    return None


def largest_motion(pairs: np.ndarray) -> float:
    """Mean difference in grey levels of the pair, of `n 2 h w 3`, that differs most."""
    grey = pairs.astype(np.float32).mean(axis=-1)
    return float(np.abs(grey[:, 1] - grey[:, 0]).mean(axis=(1, 2)).max())


def sharpness(picture: Image.Image) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000), in grey levels squared."""
    grey = np.asarray(fit_inside(picture.convert("L"), CLOSE_PX), np.float32)
    if min(grey.shape) < 3:
        return 0.0
    middle = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * middle).var())


def aesthetic_score(picture: Image.Image, config: AestheticConfig) -> float:
    """What the user's head says of a picture's CLIP vector."""
    import torch

    vectors = _load_clip(config.clip.model_dump_json()).encode_images([picture])
    with torch.inference_mode():
        return float(_load_head(config.head)(torch.from_numpy(vectors)).reshape(-1)[0])


@lru_cache(maxsize=1)
def _load_clip(config_json: str) -> Any:
    return load_clip(ClipConfig.model_validate_json(config_json))


@lru_cache(maxsize=2)
def _load_head(path: str) -> Any:
    """A module over CLIP vectors; nothing of the file is unpickled.

    Raises:
        ConfigError: no such file, or neither a linear layer nor a TorchScript.
    """
    import torch

    legal = "a file of tensors `weight` 1 d and `bias` 1, or a TorchScript"
    try:
        return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError):
        pass  # no TorchScript
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        layer = torch.nn.Linear(state["weight"].shape[1], 1)
        layer.load_state_dict(state)
    except Exception as error:  # noqa: BLE001 - torch raises many kinds on a foreign file
        raise ConfigError(f"{path} is no aesthetic head: {first_line(error)}", legal=legal) from None
    return layer.eval().requires_grad_(False)
