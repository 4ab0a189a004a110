"""CLIP preprocessing: resize, crop, normalise; equal to open_clip's transform.

The geometry (resize, crop, mode) *is* open_clip's own; only the last two steps (to float, normalise)
are done here for a whole batch at once. Between the two lies a uint8 array, a quarter of the bytes of
the floats: that is what a CPU stage should hand to an actor that holds the model.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch
    from PIL import Image

Picture: TypeAlias = "Image.Image | np.ndarray"
"""A PIL image, or uint8 [h, w, 3]."""
MAX_ASPECT = 20
"""Beyond this, only the middle is kept: resizing 1 x 10,000 pixels would need gigabytes."""


class Preprocessing(BaseModel):
    """open_clip's `preprocess_cfg` as a value: picklable, hashable, needs no weights."""

    model_config = ConfigDict(frozen=True, ignored_types=(cached_property,))
    size: tuple[int, int]
    """(height, width) in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def of(cls, values: dict[str, Any]) -> Preprocessing:
        """From open_clip's dictionary (its `size` may be one number)."""
        size = values["size"]
        pair = (size, size) if isinstance(size, int) else tuple(size)
        known = {name: values[name] for name in cls.model_fields if name in values}
        return cls.model_validate({**known, "size": pair})

    @cached_property
    def _geometry(self) -> list[Any]:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        values = self.model_dump()
        if self.size[0] == self.size[1]:
            values["size"] = self.size[0]
        transform: Any = image_transform_v2(PreprocessCfg(**values), is_train=False)
        return transform.transforms[:-2]  # without MaybeToTensor and Normalize

    def pixels(self, picture: Picture) -> np.ndarray:
        """One picture (PIL, or uint8 h w 3) -> uint8 [height, width, 3] at the model's size."""
        from infra.pictures import crop_extreme

        image = _as_pil(picture)
        if min(image.size) == 0:
            raise ValueError(f"an empty picture: {image.width} x {image.height} pixels")
        image = crop_extreme(image, max_aspect=MAX_ASPECT)
        for step in self._geometry:
            image = step(image)
        return np.asarray(image)

    def batch(self, pictures: list[Picture]) -> np.ndarray:
        """Pictures -> uint8 [n, height, width, 3]."""
        if not pictures:
            return np.empty((0, *self.size, 3), np.uint8)
        return np.stack([self.pixels(picture) for picture in pictures])

    def normalise(self, pixels: np.ndarray, device: torch.device) -> torch.Tensor:
        """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in channels-last memory, normalised on `device`."""
        import torch

        batch = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).to(torch.float32)
        # Whole rows of pixels at once, in place: a broadcast over three channels isn't vectorised, and each
        # new copy of the batch costs more than its arithmetic (0.9 ms of a CPU a picture; so 0.2).
        width = batch.shape[2]
        mean, std = (torch.tensor(values * width, device=device) for values in (self.mean, self.std))
        batch.view(*batch.shape[:2], 3 * width).div_(255).sub_(mean).div_(std)
        return batch.permute(0, 3, 1, 2)


def _as_pil(picture: Picture) -> Image.Image:
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"a picture is a PIL image or uint8 [h, w, 3]; got {picture.dtype} {list(picture.shape)}"
        )
    return Image.fromarray(picture)
