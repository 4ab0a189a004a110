"""Decodes a prompt's pictures: for the encoders, and as reference tensors for `plus` mode.

A picture that can't be decoded refuses its prompt: a DataError, at the boundary of the row.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from infra import pictures
from infra.errors import DataError
from infra.pictures import PictureError
from model.condition import MAX_REFERENCES, Prompt, References, Segment
from model.data.batch import ROLES, Role, role_number

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PICTURE_PX = 50_000_000
"""Pixels of the largest picture that is decoded (ours; PIL itself only warns, at 89 million)."""
MAX_ASPECT = 20
"""Beyond this ratio of sides only the middle is kept; encoders refuse or explode on 1 x 10,000 pixels."""
MIN_SIDE_PX = 28
"""Smaller pictures are enlarged to this: one patch of the largest patch size in use (Qwen-VL's)."""
Pictures = dict[bytes, Image.Image]
"""Encoded bytes -> decoded picture."""


def decode_picture(data: bytes | None) -> Image.Image:
    """Encoded bytes -> RGB picture, upright, transparent parts white, its sides tamed.

    Raises:
        PictureError: no bytes, not a picture, damaged, or more than MAX_PICTURE_PX pixels.
    """
    return _tame(decode_as_it_is(data))


def decode_as_it_is(data: bytes | None) -> Image.Image:
    """The same with whatever sides it has.

    Raises:
        PictureError: as `decode_picture`.
    """
    return pictures.decode_picture(data or b"", max_pixels=MAX_PICTURE_PX, formats=FORMATS, on_white=True)


def _tame(image: Image.Image) -> Image.Image:
    """Sides within a ratio of MAX_ASPECT (the middle is kept) and of at least MIN_SIDE_PX."""
    image = pictures.crop_extreme(image, max_aspect=MAX_ASPECT)
    short = min(image.size)
    if short < MIN_SIDE_PX:
        scale = MIN_SIDE_PX / short
        size = (max(MIN_SIDE_PX, round(image.width * scale)), max(MIN_SIDE_PX, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image


def reference_tensors(prompts: Sequence[Prompt], size_px: tuple[int, int]) -> References:
    """Decode the prompts' pictures for the generator itself (`plus` mode; UniVideo table 6).

    Of more than MAX_REFERENCES a prompt, retrieved pictures are left out first, then the last ones.

    Raises:
        PictureError: an undecodable picture.
    """
    chosen = [_chosen(prompt) for prompt in prompts]
    most = max(map(len, chosen), default=0)
    pictures = torch.zeros(len(prompts), most, 3, *size_px)
    mask = torch.zeros(len(prompts), most, dtype=torch.bool)
    role = torch.zeros(len(prompts), most, dtype=torch.long)
    for row, segments in enumerate(chosen):
        for place, segment in enumerate(segments):
            pictures[row, place] = _reference(segment, size_px)
            mask[row, place] = True
            role[row, place] = role_number(segment.role)
    return References(pictures, mask, role)


def _chosen(prompt: Prompt) -> list[Segment]:
    pictures = [
        n for n, s in enumerate(prompt) if s.type == "image" and s.image and ROLES[s.role].kind != "text"
    ]
    best = sorted(pictures, key=lambda n: (_importance(prompt[n].role), n))[:MAX_REFERENCES]
    return [prompt[n] for n in sorted(best)]


def _importance(role: str) -> tuple[bool, int]:
    return ROLES[role].kind == "retrieved", role_number(role)


def _reference(segment: Segment, size_px: tuple[int, int]) -> Tensor:
    image = decode_picture(segment.image)
    size = (size_px[1], size_px[0])
    if ROLES[segment.role].is_scene:
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    else:
        image = ImageOps.pad(image, size, Image.Resampling.BICUBIC, color="white")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def first_frame(prompt: Prompt) -> Segment | None:
    """The picture that its video begins with, if the prompt gives one."""
    return next((s for s in prompt if s.role == Role.FIRST_FRAME and s.type == "image" and s.image), None)


def decode_all(prompt: Prompt, decoded: Pictures) -> None:
    """Decode every picture of a prompt into `decoded`.

    Raises:
        DataError: an unknown role, or an undecodable picture; names the segment.
    """
    for place, segment in enumerate(prompt):
        if segment.role not in ROLES:
            raise DataError(f"segment {place}: role {segment.role!r}; legal: {', '.join(ROLES)}")
        if segment.type == "image" and (segment.image or b"") not in decoded:
            try:
                decoded[segment.image or b""] = decode_picture(segment.image)
            except PictureError as error:
                raise DataError(f"segment {place} ({segment.role}): {error}") from None
