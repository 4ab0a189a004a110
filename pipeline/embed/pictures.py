"""One row of a clips table -> its pictures: the model's pixels and one JPEG of bounded size."""

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from infra.config import Config
from infra.errors import DataError
from infra.storage import size_bytes
from pipeline.media import open_media, read_media
from pipeline.phash import phash64
from pipeline.schema import Media, Status
from pipeline.video.frames import VideoError, clip_times, decode_frames

if TYPE_CHECKING:
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
    """Quality of that JPEG. Ours."""
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


class PictureError(Exception):
    """This row has no usable picture; `status` says which fate it gets."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


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
        PictureError: with the status that the row gets.
    """
    if row["media"] == Media.VIDEO:
        frames = _video_frames(row, config)
    else:
        frames = [_image(row["local_uri"] or row["source_uri"], config)]
    middle = frames[len(frames) // 2]
    _check_shape(middle.shape[1], middle.shape[0], config)
    return Picture(
        pixels=preprocessing.batch(list(frames)),
        jpeg=encode_jpeg(middle, max_px=config.image_max_px, quality=config.jpeg_quality),
        phash=phash64(middle) if row.get("phash") is None else int(row["phash"]),
        width_px=int(middle.shape[1]),
        height_px=int(middle.shape[0]),
    )


def _video_frames(row: Row, config: EmbedConfig) -> list[np.ndarray]:
    times_s = clip_times(row["start_s"] or 0.0, row["end_s"] or 0.0, config.key_frames)
    try:
        return list(decode_frames(open_media(row["local_uri"] or row["source_uri"]), times_s))
    except VideoError as error:
        raise PictureError(error.status, str(error)) from error
    except FileNotFoundError as error:
        raise PictureError(Status.NOT_FOUND, str(error)) from error
    except (OSError, DataError) as error:
        raise PictureError(Status.UNREACHABLE, str(error)) from error


def _image(uri: str, config: EmbedConfig) -> np.ndarray:
    """Decode an image file to uint8 `h w 3`, upright."""
    from PIL import Image, ImageOps

    data = _bytes(uri, config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs; our own limit decides, below
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > config.max_pixels:
                    raise PictureError(Status.TOO_LARGE, f"{image.width}x{image.height} pixels")
                _check_shape(image.width, image.height, config)
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise PictureError(Status.TOO_LARGE, str(error)) from error
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(Status.UNDECODABLE, f"{type(error).__name__}: {error}") from error


def _bytes(uri: str, config: EmbedConfig) -> bytes:
    try:
        if size_bytes(uri) > config.max_picture_bytes:  # 0 for a piece of a file: known once it is read
            raise PictureError(Status.TOO_LARGE, f"{size_bytes(uri):,} bytes")
        data = read_media(uri)
    except FileNotFoundError as error:
        raise PictureError(Status.NOT_FOUND, f"no file {uri}") from error
    except (OSError, DataError) as error:
        raise PictureError(Status.UNREACHABLE, str(error)) from error
    if not data:
        raise PictureError(Status.EMPTY, "0 bytes")
    return data


def _check_shape(width_px: int, height_px: int, config: EmbedConfig) -> None:
    short, long = sorted((width_px, height_px))
    if short < 1 or long / short > config.max_aspect:
        raise PictureError(Status.FILTERED_ASPECT, f"{width_px}x{height_px} pixels")


def encode_jpeg(rgb: np.ndarray, *, max_px: int, quality: int) -> bytes:
    """JPEG of uint8 `h w 3` with its longest side at most `max_px`."""
    from PIL import Image

    image = Image.fromarray(rgb)
    if max(image.size) > max_px:
        scale = max_px / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
