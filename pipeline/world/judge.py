"""Judges videos of the world by fixed image statistics, no network: colour, shape, motion, place, background.

    background   a plane of colour through the edges of the frames, robustly
    thing        how far each pixel is from it, 0 to 1
    colour       hue of the thing's most colourful pixels: nearest of the named ones
    shape        least squares against each shape at the true size, wherever it fits best
    direction    how the thing's centre of mass drifts

A video without a thing gets answers at chance.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.world.concepts import DIRECTIONS, GROUND_COLOURS, HUES
from pipeline.world.draw import shape_mask

Numbers = Sequence[float] | np.ndarray
EDGE_SHARE = 1 / 8
"""Width of the edges that the background is estimated from, share of the side. Ours."""
FULL_STEP = 60.0
"""Distance from the background, in levels, from which on a pixel belongs to the thing wholly. Ours: true things
are at least as far."""
FITS = 4
"""Rounds of fitting the background, each without what the one before found far off."""
REACH = 0.35
"""How far from the middle a thing's centre is looked for, share of the side."""


@dataclass(frozen=True)
class Seen:
    """What is seen in a video."""

    colour: str
    shape: str
    direction: str
    background: str
    background_rgb: tuple[float, float, float]
    places: np.ndarray
    """float [t 2] (y, x) of the thing's middle in each frame, in shares of the side from the frame's middle."""


def judge_video(frames: np.ndarray, *, size: float, shapes: Sequence[str]) -> Seen:
    """What a video shows.

    Args:
        frames: uint8 `t h w 3`, square.
        size: of the thing, share of the side, as the table says.
        shapes: that it may have, in any order.
    """
    ground = background_plane(frames)
    weights = thing_weights(frames, ground)
    shape, places = match_shape(weights, size=size, shapes=tuple(sorted(shapes)))
    red, green, blue = ground.mean(axis=(0, 1)).tolist()
    return Seen(
        colour=name_colour(frames, weights),
        shape=shape,
        direction=name_direction(centres(weights)),
        background=name_background((red, green, blue)),
        background_rgb=(red, green, blue),
        places=places,
    )


def background_plane(frames: np.ndarray) -> np.ndarray:
    """The background's colour at each pixel, float64 `h w 3`: a plane through the edges of all frames."""
    count, height, width, _ = frames.shape
    y, x = np.mgrid[0:height, 0:width]
    plane = np.stack([np.ones((height, width)), y / height - 0.5, x / width - 0.5], axis=-1)
    wide = max(1, round(min(height, width) * EDGE_SHARE))
    edge = np.ones((height, width), bool)
    edge[wide:-wide, wide:-wide] = False
    places = np.tile(plane[edge], (count, 1))
    colours = frames[:, edge].reshape(-1, 3).astype(float)
    fitted = np.broadcast_to(np.median(colours, axis=0), colours.shape)
    factors = np.zeros((3, 3))
    for _ in range(FITS):
        far = np.linalg.norm(colours - fitted, axis=1)
        near = far <= max(3 * float(np.median(far)), FULL_STEP / 4)
        factors = np.linalg.lstsq(places[near], colours[near], rcond=None)[0]
        fitted = places @ factors
    return plane @ factors


def thing_weights(frames: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """How surely each pixel belongs to the thing, 0 to 1: float64 `t h w`."""
    far = np.linalg.norm(frames - ground, axis=-1)
    wide = max(1, round(far.shape[1] * EDGE_SHARE))
    edge = np.concatenate([far[:, :wide].ravel(), far[:, -wide:].ravel()])
    noise = min(float(np.median(edge)), FULL_STEP / 2)
    return np.clip((far - noise) / (FULL_STEP - noise), 0, 1)


def name_colour(frames: np.ndarray, weights: np.ndarray) -> str:
    """The named hue nearest to the thing's most colourful pixels."""
    colours = frames.reshape(-1, 3).astype(float)
    chroma = (colours.max(axis=1) - colours.min(axis=1)) * weights.ravel()
    chosen = chroma >= 0.7 * np.quantile(chroma, 0.98)
    red, green, blue = np.median(colours[chosen], axis=0) / 255
    hue = 360 * colorsys.rgb_to_hsv(red, green, blue)[0]
    return min(HUES, key=lambda name: abs((HUES[name] - hue + 180) % 360 - 180))


def match_shape(weights: np.ndarray, *, size: float, shapes: tuple[str, ...]) -> tuple[str, np.ndarray]:
    """(the shape that fits best, float [t 2] its places), each frame fitted by itself, half pixels apart."""
    count, side, _ = weights.shape
    reach_px = round(REACH * side)
    wide, steps = side + 2 * reach_px, 2 * reach_px + 1
    halves = np.array([(dy, dx) for dy in (0.0, 0.5) for dx in (0.0, 0.5)])
    draw = partial(shape_mask, size=size * side / wide, side_px=wide)
    drawn = np.array([[draw(shape, place=(dy / wide, dx / wide)) for dy, dx in halves] for shape in shapes])

    def over_windows(masks: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Sums of products of frames `t h w` and all windows of masks `s n wide wide`: `t s n steps steps`."""
        window = np.conj(np.fft.rfft2(frames, (wide, wide)))[:, None, None]
        return np.fft.irfft2(np.fft.rfft2(masks) * window, (wide, wide))[..., :steps, :steps]

    # Squared distance of frame and mask, less the frame's own square.
    errors = over_windows(drawn**2, np.ones((1, side, side))) - 2 * over_windows(drawn, weights)
    errors = errors.reshape(count, len(shapes), -1)
    shape = int(errors.min(axis=2).sum(axis=0).argmin())
    half, y, x = np.unravel_index(errors[:, shape].argmin(axis=1), (len(halves), steps, steps))
    places = reach_px - np.stack([y, x], axis=1) + halves[half]  # a window further up: the thing is lower
    return shapes[shape], places / side


def centres(weights: np.ndarray) -> np.ndarray:
    """Centre of mass in each frame, float [t 2] (y, x) in shares of the side from the frame's middle."""
    count, height, width = weights.shape
    mass = weights.sum(axis=(1, 2)) + 1e-9
    y = (weights.sum(axis=2) @ (np.arange(height) + 0.5)) / mass / height
    x = (weights.sum(axis=1) @ (np.arange(width) + 0.5)) / mass / width
    return np.stack([y, x], axis=1).reshape(count, 2) - 0.5


def name_direction(places: np.ndarray) -> str:
    """The direction in which places [t 2] drift most: their slope over time."""
    times = np.arange(len(places)) - (len(places) - 1) / 2
    slope = times @ places
    return max(DIRECTIONS, key=lambda name: float(slope @ np.array(DIRECTIONS[name])))


def name_background(rgb: Sequence[float]) -> str:
    """The named background colour nearest to this one."""
    named = {
        name: 255 * np.array(colorsys.hsv_to_rgb(h / 360, s, v)) for name, (h, s, v) in GROUND_COLOURS.items()
    }
    return min(named, key=lambda name: float(np.linalg.norm(named[name] - np.asarray(rgb))))


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences."""

    mean: float
    error: float
    """Standard error of the mean."""
    count: int
    """Pairs, or groups of them."""


def paired(one: Numbers, other: Numbers, groups: Sequence[str] | None = None) -> Difference:
    """Mean of `one - other` with its standard error.

    Args:
        one: a number for each sample.
        other: of the same samples, in the same order.
        groups: samples of one group (a noun, a prompt) are no independent draws: their mean counts once.
    """
    differences = np.asarray(one, float) - np.asarray(other, float)
    if groups is not None:
        names, places = np.unique(np.asarray(groups), return_inverse=True)
        differences = np.bincount(places, differences, len(names)) / np.bincount(places, minlength=len(names))
    count = len(differences)
    error = float(differences.std(ddof=1) / np.sqrt(count)) if count > 1 else float("inf")
    return Difference(float(differences.mean()), error, count)
