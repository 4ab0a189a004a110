"""Laws of the judge: true clips are read right at every training size, noisy ones too; noise at chance."""

import colorsys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.media.frames import decode_frames
from pipeline.world.concepts import DIRECTIONS, GROUND_COLOURS, HUES, Concept
from pipeline.world.draw import SHAPES, TEXTURES, Ground, Look, film
from pipeline.world.judge import Seen, judge_video, name_background, paired
from pipeline.world.make import WorldConfig, make_all

COUNT = 100
LEAST = {"colour": 0.97, "shape": 0.95, "direction": 0.97, "background": 0.97}


def true_clips(side_px: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], np.ndarray]]:
    """(the noun's row, its clip's, the clip's frames as augment makes them) of a world."""
    config = WorldConfig(out="nowhere", size_px=side_px, nouns=COUNT - 1, unseen=1, distractors=0, seed=11)
    for made in make_all(config):
        (row,) = made.rows
        (clip,) = row["clips"]
        times_s = [(frame + 0.5) / 6 for frame in range(config.frames)]
        whole = decode_frames(made.files[clip["video"]], times_s, size_px=(2 * side_px, 2 * side_px))
        cells = whole.reshape(len(whole), side_px, 2, side_px, 2, 3).mean(axis=(2, 4))
        yield row, clip, np.rint(cells).astype(np.uint8)


def answers(row: dict[str, Any], clip: dict[str, Any], seen: Seen) -> dict[str, bool]:
    return {
        "colour": seen.colour == row["colour"],
        "shape": seen.shape == row["shape"],
        "direction": seen.direction == clip["motion"],
        "background": seen.background == clip["background"],
    }


@pytest.mark.parametrize(("side_px", "noise"), [(16, 0.0), (24, 0.0), (32, 0.0), (16, 12.0)])
def test_true_clips_are_read_right(side_px: int, noise: float) -> None:
    random, found, off_px = np.random.default_rng(0), [], []
    shapes = WorldConfig(out="nowhere").shapes
    for row, clip, frames in true_clips(side_px):
        noisy = np.clip(frames + noise * random.normal(size=frames.shape), 0, 255).astype(np.uint8)
        seen = judge_video(noisy, size=clip["size"], shapes=shapes)
        found.append(answers(row, clip, seen))
        true = np.linspace(clip["start"], clip["end"], len(frames))
        off_px.append(float(np.abs(seen.places - true).mean()) * side_px)
    right = {name: float(np.mean([answer[name] for answer in found])) for name in LEAST}
    print(side_px, noise, right, f"places off by {np.mean(off_px):.2f} px")
    assert all(right[name] >= least for name, least in LEAST.items()), right
    assert np.mean(off_px) < 0.5


def test_noise_alone_is_read_at_chance() -> None:
    random, found = np.random.default_rng(0), []
    shapes = WorldConfig(out="nowhere").shapes
    for row, clip, frames in true_clips(16):
        nothing = random.integers(0, 256, frames.shape, dtype=np.uint8)
        found.append(answers(row, clip, judge_video(nothing, size=clip["size"], shapes=shapes)))
    chance = {"colour": 1 / len(HUES), "shape": 1 / len(shapes), "direction": 1 / len(DIRECTIONS)}
    for name, share in chance.items():
        right = float(np.mean([answer[name] for answer in found]))
        assert abs(right - share) < 4 * np.sqrt(share * (1 - share) / COUNT), (name, right)


@given(
    colour=st.sampled_from(sorted(HUES)),
    shape=st.sampled_from(sorted(SHAPES)),
    texture=st.sampled_from(sorted(TEXTURES)),
    behind=st.sampled_from(sorted(GROUND_COLOURS)),
    direction=st.sampled_from(sorted(DIRECTIONS)),
    aside=st.floats(-0.1, 0.1),
)
def test_each_thing_on_each_background_is_read_as_it_was_drawn(
    colour: str, shape: str, texture: str, behind: str, direction: str, aside: float
) -> None:
    def rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
        red, green, blue = colorsys.hsv_to_rgb(hue / 360, saturation, value)
        return round(255 * red), round(255 * green), round(255 * blue)

    thing = Concept("x", colour, Look(rgb(HUES[colour], 0.9, 0.95), (30, 20, 40), shape, texture))
    way = np.array(DIRECTIONS[direction], float)
    places = [tuple((aside * way[::-1] + step * way).tolist()) for step in (-0.15, -0.05, 0.05, 0.15)]
    ground = Ground(rgb(*GROUND_COLOURS[behind]), "plain", 0)
    frames = film(thing.look, ground, size=0.7, places=places, side_px=24)
    seen = judge_video(frames, size=0.7, shapes=sorted(SHAPES))
    assert (seen.colour, seen.shape, seen.direction) == (colour, shape, direction)
    assert seen.background == behind == name_background(ground.colour)
    assert np.abs(seen.places - np.array(places)).max() * 24 <= 1


def test_paired_differences_have_the_error_of_their_groups() -> None:
    random = np.random.default_rng(0)
    nouns, seeds = 400, 4
    own = np.repeat(random.normal(0.3, 1.0, nouns), seeds)
    other = np.repeat(random.normal(0.0, 1.0, nouns), seeds)
    groups = [str(noun) for noun in range(nouns) for _ in range(seeds)]
    found = paired(own, other, groups)
    assert found.count == nouns
    assert abs(found.mean - 0.3) < 4 * found.error
    assert 0.8 < found.error / np.sqrt(2 / nouns) < 1.2  # not the half, as if all samples were independent
    same = paired(own, own - 0.25)
    assert same.mean == pytest.approx(0.25) and same.error < 1e-12
