"""One row of a clips table -> its pictures: the model's pixels and one JPEG of bounded size."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from infra.config import Config
from infra.pictures import decode_picture, open_picture
from infra.storage import size_bytes
from pipeline.media.frames import clip_times, decode_frames
from pipeline.media.phash import phash64
from pipeline.media.store import open_media, read_media, row_errors
from pipeline.schema import Media, RowError, Status

if TYPE_CHECKING:
    from PIL.Image import Image

    from infra.clip.preprocess import Preprocessing

Row = dict[str, Any]


class EmbedConfig(Config):
    """How a clip or picture becomes a document."""

    key_frames: int = Field(default=4, ge=1, le=64)
    """Frames of a video whose image vectors are averaged (normalise, mean, normalise: RAGME, which
    takes every 25th frame). The document's picture is the middle one. 4 is ours."""
    image_max_px: int = Field(default=384, ge=32, le=4096)
    """Longest side of the document's JPEG, pixels; smaller pictures keep their size. Ours: enough for
    every common CLIP and for a report page."""
    jpeg_quality: int = Field(default=90, ge=1, le=100)
    """Quality of that JPEG. A plain JPEG that is small enough is stored as it is, without a second loss.
    Ours."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Pictures with more pixels than this are refused before they are decoded (a 40,000-pixel square
    PNG of a few kB would take 4.8 GB). Ours."""
    max_picture_bytes: int = Field(default=64_000_000, ge=1)
    """Picture files longer than this are refused unread. Ours."""
    max_aspect: float = Field(default=8.0, ge=1.0)
    """Longest over shortest side; beyond, a picture is left out: its middle crop says little. Ours."""
    max_caption_chars: int = Field(default=4096, ge=1)
    """Captions longer than this are refused: CLIP reads 77 tokens, and such a text upsets BM25's length
    normalisation. Ours."""


@dataclass(frozen=True)
class Picture:
    """What the model and the table need of one row."""

    pixels: np.ndarray
    """uint8 `k h w 3` at the model's size: one picture, or the key frames of a clip."""
    jpeg: bytes
    phash: int
    width_px: int
    height_px: int


def read_picture(row: Row, config: EmbedConfig, preprocessing: "Preprocessing") -> Picture:
    """Decode a row's picture, or key frames of its clip.

    Args:
        row: of a clips table: media, local_uri, start_s, end_s, phash.
        config: limits and sizes.
        preprocessing: of the CLIP.

    Raises:
        RowError: with the status that the row gets.
    """
    if row["media"] == Media.VIDEO:
        images, data = _video_frames(row, config), b""
    else:
        image, data = _image(row["local_uri"] or row["source_uri"], config)
        images = [image]
    middle = images[len(images) // 2]
    _check_shape(middle.width, middle.height, config)
    return Picture(
        pixels=preprocessing.batch(list(images)),
        jpeg=data or encode_jpeg(middle, max_px=config.image_max_px, quality=config.jpeg_quality),
        phash=phash64(np.asarray(middle)) if row.get("phash") is None else int(row["phash"]),
        width_px=middle.width,
        height_px=middle.height,
    )


def _video_frames(row: Row, config: EmbedConfig) -> "list[Image]":
    from PIL import Image

    times_s = clip_times(row["start_s"] or 0.0, row["end_s"] or 0.0, config.key_frames)
    with row_errors():
        frames = decode_frames(open_media(row["local_uri"] or row["source_uri"]), times_s)
        return [Image.fromarray(frame) for frame in frames]


def _image(uri: str, config: EmbedConfig) -> "tuple[Image, bytes]":
    """Decode an image file: RGB, upright; with its bytes if they can be stored as they are, else b""."""
    data = _bytes(uri, config)
    try:
        with row_errors():
            image = open_picture(data, max_pixels=config.max_pixels)
            _check_shape(image.width, image.height, config)
            keep = _is_plain_jpeg(image, data, config)
            return decode_picture(image), data if keep else b""
    except MemoryError as error:
        raise RowError(Status.UNDECODABLE, "needs more memory than there is") from error


def _is_plain_jpeg(image: "Image", data: bytes, config: EmbedConfig) -> bool:
    """Whether a file can be a document's picture unchanged: small, and nothing in it but the picture."""
    extra = {"exif", "icc_profile", "comment", "photoshop", "xmp", "adobe"} & set(image.info)
    return (
        image.format == "JPEG"
        and image.mode == "RGB"
        and not extra
        and max(image.size) <= config.image_max_px
        and len(data) <= image.width * image.height  # 8 bits a pixel: more is not the picture
    )


def _bytes(uri: str, config: EmbedConfig) -> bytes:
    with row_errors():
        if size_bytes(uri) > config.max_picture_bytes:  # 0 for a piece of a file: known once it is read
            raise RowError(Status.TOO_LARGE, f"{size_bytes(uri):,} bytes")
        data = read_media(uri)
    if not data:
        raise RowError(Status.EMPTY, "0 bytes")
    return data


def _check_shape(width_px: int, height_px: int, config: EmbedConfig) -> None:
    short, long = sorted((width_px, height_px))
    if short < 1 or long / short > config.max_aspect:
        raise RowError(Status.FILTERED_ASPECT, f"{width_px}x{height_px} pixels")


def encode_jpeg(picture: "Image | np.ndarray", *, max_px: int, quality: int) -> bytes:
    """JPEG of a picture (PIL, or uint8 `h w 3`) with its longest side at most `max_px`."""
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    if max(image.size) > max_px:
        scale = max_px / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
