"""One row of a clips table -> its pictures: the model's pixels and one JPEG of bounded size."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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
KEY_FRAMES = 4
"""Frames of a video whose image vectors are averaged (normalise, mean, normalise: RAGME, which takes every
25th frame). The document's picture is the middle one. 4 is ours."""
IMAGE_MAX_PX = 384
"""Longest side of the document's JPEG, pixels; smaller pictures keep their size. Ours: enough for every common
CLIP and for a report page."""
JPEG_QUALITY = 90
"""A plain JPEG that is small enough is stored as it is, without a second loss. Ours."""
MAX_PICTURE_BYTES = 64_000_000
"""Picture files longer than this are refused unread. Ours."""
MAX_ASPECT = 8.0
"""Longest over shortest side; beyond, a picture is left out: its middle crop says little. Ours."""


@dataclass(frozen=True)
class Picture:
    """What the model and the table need of one row."""

    pixels: np.ndarray
    """uint8 `k h w 3` at the model's size: one picture, or the key frames of a clip."""
    jpeg: bytes
    phash: int
    width_px: int
    height_px: int


def read_picture(row: Row, preprocessing: "Preprocessing", *, key_frames: int = KEY_FRAMES) -> Picture:
    """Decode a row's picture, or key frames of its clip.

    Args:
        row: of a clips table: media, local_uri, source_sha256, start_s, end_s, phash.
        preprocessing: of the CLIP.
        key_frames: decoded of a video.

    Raises:
        RowError: with the status that the row gets.
    """
    if row["media"] == Media.VIDEO:
        images, data = _video_frames(row, key_frames), b""
    else:
        image, data = _image(row["local_uri"] or row["source_uri"], row["source_sha256"])
        images = [image]
    middle = images[len(images) // 2]
    _check_shape(middle.width, middle.height)
    return Picture(
        pixels=preprocessing.batch(list(images)),
        jpeg=data or encode_jpeg(middle, max_px=IMAGE_MAX_PX, quality=JPEG_QUALITY),
        phash=phash64(np.asarray(middle)) if row.get("phash") is None else int(row["phash"]),
        width_px=middle.width,
        height_px=middle.height,
    )


def _video_frames(row: Row, key_frames: int) -> "list[Image]":
    from PIL import Image

    times_s = clip_times(row["start_s"] or 0.0, row["end_s"] or 0.0, key_frames)
    with row_errors():
        frames = decode_frames(open_media(row["local_uri"] or row["source_uri"], row["source_sha256"]), times_s)
        return [Image.fromarray(frame) for frame in frames]


def _image(uri: str, sha256: str | None) -> "tuple[Image, bytes]":
    """Decode an image file: RGB, upright; with its bytes if they can be stored as they are, else b""."""
    data = _bytes(uri, sha256)
    try:
        with row_errors():
            image = open_picture(data)
            _check_shape(image.width, image.height)
            keep = _is_plain_jpeg(image, data)
            return decode_picture(image), data if keep else b""
    except MemoryError as error:
        raise RowError(Status.UNDECODABLE, "needs more memory than there is") from error


def _is_plain_jpeg(image: "Image", data: bytes) -> bool:
    """Whether a file can be a document's picture unchanged: small, and nothing in it but the picture."""
    extra = {"exif", "icc_profile", "comment", "photoshop", "xmp", "adobe"} & set(image.info)
    return (
        image.format == "JPEG"
        and image.mode == "RGB"
        and not extra
        and max(image.size) <= IMAGE_MAX_PX
        and len(data) <= image.width * image.height  # 8 bits a pixel: more is not the picture
    )


def _bytes(uri: str, sha256: str | None) -> bytes:
    with row_errors():
        if size_bytes(uri) > MAX_PICTURE_BYTES:  # 0 for a piece of a file: known once it is read
            raise RowError(Status.TOO_LARGE, f"{size_bytes(uri):,} bytes")
        data = read_media(uri, sha256)
    if not data:
        raise RowError(Status.EMPTY, "0 bytes")
    return data


def _check_shape(width_px: int, height_px: int) -> None:
    short, long = sorted((width_px, height_px))
    if short < 1 or long / short > MAX_ASPECT:
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
