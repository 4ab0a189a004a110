"""Pictures of a prompt: encoded bytes -> PIL for the encoders, -> reference tensors for `plus` mode."""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from infra.errors import DataError
from model.condition import Prompt, Segment

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PICTURE_PX = 50_000_000
"""Pixels of the largest picture that is decoded (ours; PIL itself only warns, at 89 million)."""
MAX_ASPECT = 20
"""Beyond this ratio of sides only the middle is kept; encoders refuse or explode on 1 x 10,000 pixels."""
MIN_SIDE_PX = 28
"""Smaller pictures are enlarged to this: one patch of the largest patch size in use (Qwen-VL's)."""
REFERENCE_ROLES = ("subject", "background", "first_frame", "retrieved")
COVER_ROLES = ("background", "first_frame")
"""Pictures of whole scenes: resized to cover; the others are shown whole, on white."""


class PictureError(DataError):
    """A picture of a prompt that can't be decoded."""


def decode_picture(data: bytes | None, *, max_px: int = MAX_PICTURE_PX) -> Image.Image:
    """Encoded bytes -> RGB picture, upright, transparent parts white.

    Raises:
        PictureError: no bytes, not a picture, damaged, or more than `max_px` pixels (decided from the
            header: a bomb is never unpacked).
    """
    if not data:
        raise PictureError("a picture without bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_px:
                raise PictureError(f"a picture of {width} x {height} pixels; legal: at most {max_px}")
            image.load()
            return _tame(_on_white(ImageOps.exif_transpose(image)))
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(str(error)) from None
    except Exception as error:  # noqa: BLE001  (decoders raise anything on hostile bytes: the row boundary)
        raise PictureError(f"not a readable picture: {type(error).__name__}: {error}") from None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _tame(image: Image.Image) -> Image.Image:
    """Sides within a ratio of MAX_ASPECT (the middle is kept) and of at least MIN_SIDE_PX."""
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    if max(width, height) > limit:
        left, top = max(0, width - limit) // 2, max(0, height - limit) // 2
        image = image.crop((left, top, left + min(width, limit), top + min(height, limit)))
    short = min(image.size)
    if short < MIN_SIDE_PX:
        scale = MIN_SIDE_PX / short
        size = (max(MIN_SIDE_PX, round(image.width * scale)), max(MIN_SIDE_PX, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image


def reference_tensors(
    prompts: Sequence[Prompt],
    size_px: tuple[int, int],
    *,
    max_references: int = 8,
    roles: Sequence[str] = REFERENCE_ROLES,
    max_px: int = MAX_PICTURE_PX,
) -> tuple[Tensor, Tensor]:
    """Decode the prompts' pictures for the generator itself (`plus` mode; UniVideo table 6).

    Args:
        prompts: as given to the encoder, after `select`.
        size_px: (height, width) of every reference.
        max_references: per prompt; further pictures are left out, in the order of `roles`.
        roles: which pictures, the most important first.
        max_px: as in `decode_picture`.

    Returns:
        `b n 3 h w` in [-1, 1], in the prompt's order, and the `b n` bool mask; n is the most that any
        prompt has (0 when none has a picture). What is masked is zero.

    Raises:
        PictureError: an undecodable picture.
    """
    chosen = [_chosen(prompt, max_references, roles) for prompt in prompts]
    most = max(map(len, chosen), default=0)
    references = torch.zeros(len(prompts), most, 3, *size_px)
    mask = torch.zeros(len(prompts), most, dtype=torch.bool)
    for row, segments in enumerate(chosen):
        for place, segment in enumerate(segments):
            references[row, place] = _reference(segment, size_px, max_px)
            mask[row, place] = True
    return references, mask


def _chosen(prompt: Prompt, max_references: int, roles: Sequence[str]) -> list[Segment]:
    places = [n for n, s in enumerate(prompt) if s.type == "image" and s.image and s.role in roles]
    best = sorted(places, key=lambda n: (list(roles).index(prompt[n].role), n))[:max_references]
    return [prompt[n] for n in sorted(best)]


def _reference(segment: Segment, size_px: tuple[int, int], max_px: int) -> Tensor:
    image = decode_picture(segment.image, max_px=max_px)
    size = (size_px[1], size_px[0])
    if segment.role in COVER_ROLES:
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    else:
        image = ImageOps.pad(image, size, Image.Resampling.BICUBIC, color="white")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
