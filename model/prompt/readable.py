"""The row boundary of the encoders: a picture that can't be decoded is refused, or left out and told."""

import logging
from dataclasses import replace

from PIL import Image

from infra.errors import DataError
from model.condition import ROLES, Prompt
from model.prompt.config import PromptEncoderConfig
from model.prompt.pictures import PictureError, decode_picture

log = logging.getLogger(__name__)


Pictures = dict[bytes, Image.Image]
"""Encoded bytes -> decoded picture."""


def readable(prompt: Prompt, config: PromptEncoderConfig, pictures: Pictures) -> Prompt:
    """The prompt with every picture decodable; positions stay.

    Args:
        prompt: as it came.
        config: what to do with bad pictures, and the limit on pixels.
        pictures: takes up the decoded pictures.

    Raises:
        DataError: an unknown role, or an undecodable picture and `bad_pictures: refuse`.
    """
    segments = []
    for place, segment in enumerate(prompt):
        if segment.role not in ROLES:
            raise DataError(f"segment {place}: role {segment.role!r}; legal: {', '.join(ROLES)}")
        if segment.type == "image" and (segment.image or b"") not in pictures:
            try:
                picture = decode_picture(segment.image, max_px=config.max_picture_px)
                pictures[segment.image or b""] = picture
            except PictureError as error:
                if config.bad_pictures == "refuse":
                    raise DataError(f"segment {place} ({segment.role}): {error}") from None
                log.warning("left out segment %d (%s): %s", place, segment.role, error)
                segment = replace(segment, image=None)
        segments.append(segment)
    return tuple(segments)
