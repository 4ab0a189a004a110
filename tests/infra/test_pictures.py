"""Laws of the picture decoder: upright RGB of known formats, or one exception; bombs are never unpacked."""

import io
import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageOps

from infra.pictures import PictureError, decode_picture, open_picture, upright_size


def encoded(mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = (60, 40), **options) -> bytes:
    """A picture of smooth colours, encoded."""
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind="JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_picture(data)), np.asarray(expected))
    assert upright_size(open_picture(data)) == (expected.height, expected.width)
    assert decode_picture(data, shrink_to_px=(8, 8)).size == (8, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_known_formats_come_out_as_rgb_without_metadata(kind: str) -> None:
    picture = decode_picture(encoded("L" if kind == "JPEG" else "RGB", kind))
    assert (picture.mode, picture.size, picture.info) == ("RGB", (60, 40), {})


def test_transparent_parts_are_white_when_asked() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decode_picture(buffer.getvalue()).getpixel((0, 0)) == (255, 0, 0)
    assert decode_picture(buffer.getvalue(), on_white=True).getpixel((0, 0)) == (255, 255, 255)


def test_a_bomb_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT", b"IEND"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for limit in (1000, 10**8, 10**12):  # beyond Pillow's own limit, its error says the same
        with pytest.raises(PictureError, match="pixels") as caught:
            open_picture(data, max_pixels=limit)
        assert caught.value.too_large


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"]
)
def test_what_is_no_picture_is_one_exception(data: bytes) -> None:
    with pytest.raises(PictureError) as caught:
        decode_picture(data)
    assert not caught.value.too_large and "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_damaged_pictures_decode_or_raise_picture_error(kind: str) -> None:
    good, rng = encoded(kind=kind), random.Random(0)
    for _ in range(200):
        data = bytearray(good[: rng.randrange(1, len(good) + 1)])
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with suppress(PictureError):
            assert decode_picture(bytes(data), max_pixels=10**6).mode == "RGB"
