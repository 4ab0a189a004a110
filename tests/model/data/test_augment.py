"""Laws of augmented references: a function of (seed, position), of subjects alone, and they stay the thing."""

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from model.condition import Segment
from model.data.augment import augment_picture, augment_references


def disc() -> bytes:
    """A red disc on white, 336 x 336, as a cut-out is."""
    picture = Image.new("RGB", (336, 336), (255, 255, 255))
    ImageDraw.Draw(picture).ellipse((60, 40, 276, 296), fill=(220, 30, 30))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@given(st.integers(0, 2**31), st.integers(0, 2**40))
@settings(max_examples=25)
def test_a_changed_reference_still_shows_the_thing_on_white(seed: int, index: int):
    found = pixels(augment_picture(disc(), seed=seed, index=index, place=0))
    red = (found[..., 0] > 140) & (found[..., 1] < 90)
    assert 0.15 < red.mean() < 0.85
    assert max(found.shape) >= 75  # 112 of the whole, less a crop of two thirds
    assert max(found.shape) <= 336 * 1.4


def test_references_depend_on_seed_position_and_place_alone():
    one = augment_picture(disc(), seed=1, index=5, place=0)
    assert one == augment_picture(disc(), seed=1, index=5, place=0)
    others = [
        augment_picture(disc(), seed=s, index=i, place=p) for s, i, p in [(2, 5, 0), (1, 6, 0), (1, 5, 1)]
    ]
    assert len({one, *others}) == 4


def test_only_pictures_of_subjects_change():
    prompt = (
        Segment("text", "caption", "a ", None),
        Segment("image", "subject", "disc", disc()),
        Segment("image", "background", "room", disc()),
        Segment("image", "retrieved", None, disc()),
        Segment("image", "first_frame", None, disc()),
    )
    changed = augment_references(prompt, seed=0, index=3)
    assert [a == b for a, b in zip(prompt, changed, strict=True)] == [True, False, True, True, True]
    assert (changed[1].text, changed[1].role) == ("disc", "subject")
