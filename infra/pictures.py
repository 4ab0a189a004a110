"""Decodes untrusted pictures safely: bytes -> an upright RGB picture, or a PictureError.

Formats are a closed list, the size is judged by the header before anything is decoded (decompression
bombs), the EXIF orientation is applied, and whatever a decoder raises on hostile bytes is one exception.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from infra.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Pillow's names of the formats that are decoded; no EPS (runs Ghostscript), no exotic ones."""
MAX_PIXELS = 100_000_000
"""Pictures with more pixels are refused unless the caller says otherwise. Ours: a 40,000-pixel square PNG
of a few kB would take 4.8 GB."""
ORIENTATION = 0x0112
"""The EXIF tag."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""


class PictureError(DataError):
    """A picture that can't be decoded, or that has too many pixels (`too_large`)."""

    def __init__(self, reason: str, *, too_large: bool = False) -> None:
        super().__init__(reason)
        self.too_large = too_large


def open_picture(
    source: bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """Read a picture's header: format, size and metadata are known, nothing is decoded yet.

    Raises:
        PictureError: empty, of no known format, or more than `max_pixels` pixels.
    """
    if not source:
        raise PictureError("a picture without bytes")
    with _picture_errors():
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError(f"picture of {width}x{height} pixels, more than {max_pixels:,}", too_large=True)
    return image


def decode_picture(
    source: bytes | BinaryIO | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = FORMATS,
    on_white: bool = False,
    shrink_to_px: tuple[int, int] | None = None,
) -> Image.Image:
    """Decode a picture: RGB, upright, without metadata.

    Args:
        source: encoded bytes, a file, or what `open_picture` gave.
        max_pixels: pixels of the largest picture that is decoded.
        formats: Pillow's names of the formats that are decoded.
        on_white: lay transparent parts on white; else they show the colour that lies beneath.
        shrink_to_px: (height, width) to average the picture to before it is turned upright; a JPEG is
            then not even decoded at its full size.

    Raises:
        PictureError: not a picture, damaged, or too large.
        MemoryError: as the caller's own limit has it.
    """
    if not isinstance(source, Image.Image):
        source = open_picture(source, max_pixels=max_pixels, formats=formats)
    with _picture_errors():
        return _decode(source, on_white, shrink_to_px)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened picture once it is turned upright."""
    width, height = image.size
    with _picture_errors():
        return (width, height) if _orientation(image) >= 5 else (height, width)


def crop_extreme(image: Image.Image, *, max_aspect: int) -> Image.Image:
    """The middle of a picture whose sides differ by more than this ratio; others unchanged."""
    width, height = image.size
    limit = max_aspect * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, width - limit) // 2, max(0, height - limit) // 2
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


def fit_inside(image: Image.Image, side_px: int) -> Image.Image:
    """Shrink to at most `side_px` on the longer side; never enlarge."""
    scale = side_px / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _decode(image: Image.Image, on_white: bool, shrink_to_px: tuple[int, int] | None) -> Image.Image:
    turn = TURNS.get(_orientation(image))
    size = (shrink_to_px[1], shrink_to_px[0]) if shrink_to_px else None
    if size:
        image.draft("RGB", (size[0] * 2, size[1] * 2))
    rgb = _on_white(image) if on_white else image.convert("RGB")
    if size:
        rgb = rgb.resize(size, Image.Resampling.BOX)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # comments and the like would be written into any JPEG that is made of it
    return rgb


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ORIENTATION, 1)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@contextmanager
def _picture_errors() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs; the limit here decides
            yield
    except (PictureError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - the boundary: on hostile bytes decoders raise anything
        raise _reason(error) from None


def _reason(error: Exception) -> PictureError:
    if isinstance(error, UnidentifiedImageError):  # its own words name an object in memory
        return PictureError("not a readable picture: of no known format")
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Image.DecompressionBombError):
        return PictureError(text, too_large=True)
    return PictureError(f"not a readable picture: {type(error).__name__}: {text}")
