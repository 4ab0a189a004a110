"""Pictures of a prompt: decoded safely, and as reference tensors."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.condition import Segment, concat_references
from model.data.batch import role_number
from model.prompt.pictures import PictureError, ReferenceSize, decode_picture, reference_tensors


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def flat(color: tuple[int, ...], width: int = 60, height: int = 40, mode: str = "RGB") -> bytes:
    return encode(Image.new(mode, (width, height), color))


def png_bomb(side: int) -> bytes:
    """A PNG of a few dozen bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [8_000, 12_000, 40_000, 2_000_000_000])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(PictureError, match="pixels"):
        decode_picture(png_bomb(side))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), place=st.integers(0, 400), cut=st.integers(0, 400))
def test_hostile_bytes_give_a_picture_or_a_picture_error(data: bytes, place: int, cut: int) -> None:
    """Noise, and real JPEG and PNG files with noise in them, cut anywhere."""
    for good in (flat((1, 2, 3)), encode(Image.new("RGB", (60, 40)), "JPEG"), b""):
        try:
            image = decode_picture((good[:place] + data + good[place:])[: cut or None])
        except PictureError:
            continue
        assert image.mode == "RGB" and min(image.size) > 0


@pytest.mark.parametrize("data", [None, b"", b"not a picture"])
def test_what_is_no_picture_is_refused(data: bytes | None) -> None:
    with pytest.raises(PictureError):
        decode_picture(data)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    mode=st.sampled_from(["RGB", "L", "RGBA", "LA", "P", "1", "I;16"]),
)
def test_any_size_and_mode_becomes_a_picture_that_encoders_take(width: int, height: int, mode: str) -> None:
    image = decode_picture(encode(Image.new(mode, (width, height))))
    assert image.mode == "RGB"
    assert min(image.size) >= 28 and max(image.size) <= 21 * min(image.size)


def test_transparent_parts_become_white() -> None:
    image = decode_picture(flat((10, 20, 30, 0), mode="RGBA"))
    assert image.getpixel((5, 5)) == (255, 255, 255)


def test_a_turned_photograph_is_turned_upright() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    Image.new("RGB", (60, 40)).save(buffer, "JPEG", exif=exif)
    assert decode_picture(buffer.getvalue()).size == (40, 60)


def picture(role: str, color: tuple[int, int, int], *, width: int = 60, height: int = 40) -> Segment:
    return Segment("image", role, image=flat(color, width, height))


def test_references_are_in_prompt_order_scaled_and_masked() -> None:
    prompts = [
        (picture("retrieved", (255, 255, 255)), Segment("text", "caption", "x"), picture("subject", (0, 0, 0))),
        (Segment("text", "caption", "x"),),
        (picture("first_frame", (255, 0, 0)),),
    ]
    references = reference_tensors(prompts, ReferenceSize(32, 48))
    pictures = references.pictures
    assert pictures.shape == (3, 2, 3, 32, 48) and pictures.dtype == torch.uint8
    assert references.mask.tolist() == [[True, True], [False, False], [True, False]]
    assert references.place.tolist() == [[0, 2], [0, 0], [0, 0]]
    assert pictures[0, 0].eq(255).all() and pictures[0, 1, :, 16, 24].eq(0).all()
    assert pictures[2, 0, :, 0, 0].tolist() == [255, 0, 0]
    assert not pictures[1].any()


def test_references_bear_the_role_of_their_segment() -> None:
    roles = ["retrieved", "subject", "background", "first_frame"]
    shown = reference_tensors([tuple(picture(role, (9, 9, 9)) for role in roles), ()], ReferenceSize(16, 16))
    assert shown.role.tolist() == [[role_number(role) for role in roles], [0] * 4]


def test_subjects_are_shown_whole_on_white_and_scenes_fill_the_frame() -> None:
    wide = {"width": 120, "height": 30}
    prompt = (picture("subject", (0, 0, 0), **wide), picture("background", (0, 0, 0), **wide))
    shown = reference_tensors([prompt], ReferenceSize(32, 32))
    subject, scene = shown.pictures[0, 0, 0], shown.pictures[0, 1, 0]
    assert subject[0].eq(255).all() and subject[16].eq(0).all()
    assert scene.eq(0).all()


def test_a_place_in_a_scene_is_the_same_place_in_the_video() -> None:
    """Cropped to the video's shape as its frames are, then squeezed to the size that the generator sees."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255  # the right half is white
    pixels[:, :10] = pixels[:, 70:] = 128  # what a video of 3:2 loses at the sides
    scene = Segment("image", "background", image=encode(Image.fromarray(pixels)))
    (seen,) = reference_tensors([(scene,)], ReferenceSize(16, 16, aspect=1.5)).pictures[0]
    assert seen[:, :, 1:7].eq(0).all() and seen[:, :, 9:15].eq(255).all()


def test_too_many_references_keep_the_most_important(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.prompt.pictures.MAX_REFERENCES", 2)
    prompt = (
        picture("retrieved", (255, 0, 0)),
        picture("background", (0, 255, 0)),
        picture("subject", (0, 0, 255)),
    )
    shown = reference_tensors([prompt], ReferenceSize(16, 16))
    assert shown.pictures[0, :, :, 8, 8].tolist() == [[0, 255, 0], [0, 0, 255]]
    assert shown.place.tolist() == [[1, 2]]


def test_no_pictures_at_all_give_no_references() -> None:
    shown = reference_tensors([()], ReferenceSize(16, 16))
    assert shown.pictures.shape == (1, 0, 3, 16, 16) and shown.mask.shape == shown.role.shape == (1, 0)


def test_batches_join_whatever_their_numbers_of_pictures() -> None:
    """One without any has no latents to say their shape."""
    size, latents = ReferenceSize(16, 16), torch.arange(20.0).view(5, 2, 2)
    prompts = [(), (picture("subject", (0, 0, 0)), picture("retrieved", (0, 0, 0)))]
    for see, shape in ((None, (3, 16, 16)), (lambda segment, size: latents, (5, 2, 2))):
        each = [reference_tensors([prompt], size, **({"see": see} if see else {})) for prompt in prompts]
        joined = concat_references(each)
        assert joined.pictures.shape == (2, 2, *shape) and joined.mask.tolist() == [[False] * 2, [True] * 2]
        assert not joined.pictures[0].any() and torch.equal(joined.pictures[1:], each[1].pictures)
