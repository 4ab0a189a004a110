"""Decodes a prompt's pictures: for the encoders, and as reference tensors for `plus` mode.

A picture that can't be decoded refuses its prompt: a DataError, at the boundary of the row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from infra import pictures
from infra.config import canonical_json
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


@dataclass(frozen=True)
class ReferenceSize:
    """At what size the generator sees pictures, and of what shape its videos are.

    Attributes:
        height_px, width_px: of the pictures.
        aspect: width by height of its videos: scenes are cropped to it, then take the pictures' size, so that
            a place in the picture is the same place in the video. None = the pictures'.
    """

    height_px: int
    width_px: int
    aspect: float | None = None


def reference_pixels(segment: Segment, size: ReferenceSize) -> Tensor:
    """uint8 `3 h w`: subjects and documents whole, on white; scenes cropped to the videos' shape."""
    image, sides = decode_picture(segment.image), (size.width_px, size.height_px)
    if ROLES[segment.role].is_scene:
        box = _middle(image, size.aspect or size.width_px / size.height_px)
        image = image.resize(sides, Image.Resampling.BICUBIC, box=box)
    else:
        image = ImageOps.pad(image, sides, Image.Resampling.BICUBIC, color="white")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def reference_tensors(
    prompts: Sequence[Prompt],
    size: ReferenceSize,
    see: Callable[[Segment, ReferenceSize], Tensor] = reference_pixels,
) -> References:
    """The prompts' pictures for the generator itself (`plus` mode; UniVideo table 6), as `see` makes each.

    Of more than MAX_REFERENCES a prompt, retrieved pictures are left out first, then the last ones.

    Raises:
        PictureError: an undecodable picture.
    """
    chosen = [chosen_pictures(prompt) for prompt in prompts]
    made = [[see(segment, size) for _, segment in each] for each in chosen]
    blank = torch.zeros(3, size.height_px, size.width_px, dtype=torch.uint8)
    some = next((one for each in made for one in each), blank)
    most = max(map(len, chosen), default=0)
    shown = some.new_zeros(len(prompts), most, *some.shape)
    mask = torch.zeros(len(prompts), most, dtype=torch.bool)
    role, place = torch.zeros(2, len(prompts), most, dtype=torch.long).unbind()
    for row, each in enumerate(chosen):
        for number, (position, segment) in enumerate(each):
            shown[row, number] = made[row][number]
            mask[row, number] = True
            role[row, number], place[row, number] = role_number(segment.role), position
    return References(shown, mask, role, place)


def chosen_pictures(prompt: Prompt) -> list[tuple[int, Segment]]:
    """The pictures of a prompt that the generator sees itself, with their positions."""
    pictures = [
        n for n, s in enumerate(prompt) if s.type == "image" and s.image and ROLES[s.role].kind != "text"
    ]
    best = sorted(pictures, key=lambda n: (_importance(prompt[n].role), n))[:MAX_REFERENCES]
    return [(n, prompt[n]) for n in sorted(best)]


def _importance(role: str) -> tuple[bool, int]:
    return ROLES[role].kind == "retrieved", role_number(role)


def _middle(image: Image.Image, aspect: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the largest middle of this width by height."""
    width, height = min(image.width, image.height * aspect), min(image.height, image.width / aspect)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return left, top, left + width, top + height


def picture_key(autoencoder_content: str, segment: Segment, size: ReferenceSize) -> str:
    """Hex sha256 of all that a reference's latents depend on."""
    is_scene = ROLES[segment.role].is_scene
    seen = [size.height_px, size.width_px, str(size.aspect) if is_scene else None]
    digest = sha256(canonical_json([autoencoder_content, is_scene, seen]))
    digest.update(segment.image or b"")
    return digest.hexdigest()


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
