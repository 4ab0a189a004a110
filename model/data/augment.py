"""Changes reference pictures when they are loaded, by Video Alchemist's list, so that copying one does not pay.

Each picture of a subject is drawn anew for each sample: a function of (seed, position, place in the prompt).
"""

import io
from dataclasses import replace

import torch
from PIL import Image, ImageEnhance, ImageFilter

from infra.pictures import decode_picture
from model.condition import Prompt
from model.data.batch import Role
from model.step import sample_generator

MIN_SIDE_PX = 112
"""A picture shrinks to at least so many pixels of its longer side."""
BLUR, COLOUR, BRIGHTNESS, SHEAR = 1 / 50, 0.05, 0.1, 0.05
"""Greatest blur kernel (share of the longer side), change of colour, change of brightness, shear."""
TURN_DEG, MIN_CROP = 20, 0.67
"""Greatest rotation, least share of each side that a crop keeps."""
WHITE = (255, 255, 255)


def augment_references(prompt: Prompt, *, seed: int, index: int) -> Prompt:
    """The prompt with each picture of a subject changed, as drawn for the sample at `index`.

    Raises:
        PictureError: one can't be decoded.
    """
    return tuple(
        replace(segment, image=augment_picture(segment.image, seed=seed, index=index, place=place))
        if segment.type == "image" and segment.role == Role.SUBJECT and segment.image
        else segment
        for place, segment in enumerate(prompt)
    )


def augment_picture(data: bytes, *, seed: int, index: int, place: int) -> bytes:
    """PNG of the picture, changed: smaller, blurred, of other colour, flipped, sheared, turned and cropped."""
    generator = sample_generator(seed, index, f"reference {place}")
    drawn = iter(torch.rand(10, generator=generator, dtype=torch.float64).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(drawn)

    picture = decode_picture(data).convert("RGB")
    picture = _crop(picture, between(MIN_CROP, 1), next(drawn), next(drawn))
    scale = between(min(MIN_SIDE_PX / max(picture.size), 1), 1)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    picture = picture.filter(ImageFilter.BoxBlur(between(0, max(picture.size) * BLUR) / 2))
    picture = ImageEnhance.Color(picture).enhance(between(1 - COLOUR, 1 + COLOUR))
    picture = ImageEnhance.Brightness(picture).enhance(between(1 - BRIGHTNESS, 1 + BRIGHTNESS))
    if next(drawn) < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = _shear(picture, between(-SHEAR, SHEAR))
    angle_deg = between(-TURN_DEG, TURN_DEG)
    picture = picture.rotate(angle_deg, Image.Resampling.BICUBIC, expand=True, fillcolor=WHITE)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _crop(picture: Image.Image, share: float, x: float, y: float) -> Image.Image:
    """`share` of each side, at the place (x, y) of [0, 1] among those that it could have."""
    width, height = (max(1, round(side * share)) for side in picture.size)
    left, top = round(x * (picture.width - width)), round(y * (picture.height - height))
    return picture.crop((left, top, left + width, top + height))


def _shear(picture: Image.Image, by: float) -> Image.Image:
    """Shifts rows sideways by `by` of their distance from the middle; what comes in is white."""
    matrix = (1, by, -by * picture.height / 2, 0, 1, 0)
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=WHITE
    )
