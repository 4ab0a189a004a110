"""Draws the world's pictures: a shape with a texture in two colours on a background. numpy alone.

Everything is drawn several times finer and averaged, so that edges are smooth at any size. Places and sizes are
shares of the picture's side; (0, 0) is its middle, y points down.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rgb = tuple[int, int, int]
Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]
FINER = 4
"""Drawn so many times finer along each side, then averaged. Ours: at 16 pixels an edge still has 16 levels."""
SECOND_SHARE = 0.4
"""Of a stripe's or check's period that has the second colour: the first one prevails. Ours."""
PERIODS = 2.5
"""Stripes on a thing from edge to edge: three can be told at 16 pixels. Ours."""


def _star(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    angle = np.arctan2(x, -y) % (2 * np.pi / 5) - np.pi / 5
    return np.hypot(y, x) * np.cos(angle) < 0.42 + 0.4 * (np.abs(angle) / (np.pi / 5)) ** 2


SHAPES: dict[str, Inside] = {
    "square": lambda y, x: np.maximum(np.abs(y), np.abs(x)) < 0.88,
    "disc": lambda y, x: y * y + x * x < 1,
    "diamond": lambda y, x: np.abs(y) + np.abs(x) < 1,
    "cross": lambda y, x: (np.minimum(np.abs(y), np.abs(x)) < 0.32) & (np.maximum(np.abs(y), np.abs(x)) < 1),
    "triangle": lambda y, x: (y < 0.9) & (2 * np.abs(x) < y + 1),
    "ring": lambda y, x: (y * y + x * x < 1) & (y * y + x * x > 0.3),
    "star": _star,
    "bar": lambda y, x: (np.abs(y) < 0.45) & (np.abs(x) < 1),
}
"""Is a point, in halves of the thing's size from its middle, inside? Told apart at 16 pixels."""


def _stripe(place: np.ndarray) -> np.ndarray:
    """Where stripes along `place` (-1 to 1 over the thing) have the second colour; the middle has the first."""
    phase = (place * PERIODS / 2 + 0.5 * (1 - SECOND_SHARE)) % 1.0
    return phase >= 1 - SECOND_SHARE


TEXTURES: dict[str, Inside] = {
    "plain": lambda y, x: np.zeros(np.broadcast(y, x).shape, bool),
    "stripes across": lambda y, x: np.broadcast_to(_stripe(y), np.broadcast(y, x).shape),
    "stripes down": lambda y, x: np.broadcast_to(_stripe(x), np.broadcast(y, x).shape),
    "checks": lambda y, x: (np.floor(2 * y) + np.floor(2 * x)) % 2 == 1,
    "dots": lambda y, x: (_to_dot(y) ** 2 + _to_dot(x) ** 2) < 0.055,
}
"""Has a point of the thing the second colour? Coordinates as in `SHAPES`."""


def _to_dot(place: np.ndarray) -> np.ndarray:
    """Distance to the nearest line of dots, in their spacing."""
    return (place * 1.35) % 1.0 - 0.5


@dataclass(frozen=True)
class Look:
    """What a thing looks like."""

    colour: Rgb
    second_colour: Rgb
    shape: str
    texture: str


@dataclass(frozen=True)
class Ground:
    """A background."""

    colour: Rgb
    kind: str
    """One of `GROUNDS`."""
    seed: int
    """Of its pattern."""


def axes(side_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Middles of the pixels along y `n 1` and x `1 n`, from -.5 to .5."""
    places = (np.arange(side_px) + 0.5) / side_px - 0.5
    return places[:, None], places[None, :]


def _plain(y: np.ndarray, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.zeros(np.broadcast(y, x).shape)


def _gradient(y: np.ndarray, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    angle = random.uniform(0, 2 * np.pi)
    return 52 * (y * np.sin(angle) + x * np.cos(angle))


def _waves(y: np.ndarray, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    total = np.zeros(np.broadcast(y, x).shape)
    for fy, fx, phase in random.uniform((-4, -4, 0), (4, 4, 2 * np.pi), (6, 3)):
        total += np.cos(2 * np.pi * (fy * y + fx * x) + phase)
    return 20 * total


def _stripes(y: np.ndarray, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    angle, frequency = random.uniform(0, np.pi), random.uniform(3, 9)
    return 45 * np.sign(np.sin(2 * np.pi * frequency * (y * np.sin(angle) + x * np.cos(angle))))


def _clouds(y: np.ndarray, x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    total = np.zeros(np.broadcast(y, x).shape)
    for cells in (3, 6, 12, 24, 48):
        levels = random.normal(size=(cells + 1, cells + 1))
        total += _between(y, levels) @ levels @ _between(x, levels).T / np.sqrt(cells)
    return 80 * total


def _between(places: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Weights `n m` that interpolate m levels, evenly spaced over the picture, at n places."""
    at = (places.ravel() + 0.5) * (len(levels) - 1)
    return np.clip(1 - np.abs(at[:, None] - np.arange(len(levels))), 0, None)


GROUNDS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "plain": _plain,
    "gradient": _gradient,
    "waves": _waves,
    "stripes": _stripes,
    "clouds": _clouds,
}
"""Patterns of backgrounds: coordinates of `axes` -> levels of 255 around 0."""


def ground_picture(ground: Ground, side_px: int) -> np.ndarray:
    """A background alone, float32 `h w 3` from 0 to 255."""
    y, x = axes(side_px)
    pattern = GROUNDS[ground.kind](y, x, np.random.default_rng(ground.seed))
    return np.clip(np.asarray(ground.colour, np.float32) + pattern[..., None], 0, 255).astype(np.float32)


def picture(look: Look, ground: Ground, *, size: float, place: tuple[float, float], side_px: int) -> np.ndarray:
    """One picture, uint8 `h w 3`."""
    return film(look, ground, size=size, places=[place], side_px=side_px)[0]


def film(
    look: Look, ground: Ground, *, size: float, places: list[tuple[float, float]], side_px: int
) -> np.ndarray:
    """The thing at each place, on one background that stays.

    Args:
        look: the thing's.
        ground: the background.
        size: of the thing, share of the side.
        places: (y, x) of its middle in each frame.
        side_px: of the square frames.

    Returns:
        uint8 `t h w 3`.
    """
    behind = ground_picture(ground, side_px)
    return np.stack([_frame(look, behind, size, place) for place in places])


def shape_mask(shape: str, *, size: float, place: tuple[float, float], side_px: int) -> np.ndarray:
    """Share of each pixel that a shape covers, float32 `h w`."""
    return _averaged(SHAPES[shape](*_thing_axes(size, place, side_px)))


def _thing_axes(size: float, place: tuple[float, float], side_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Fine coordinates, in halves of the thing's size from its middle."""
    y, x = (2 * (axis - middle) / size for axis, middle in zip(axes(side_px * FINER), place, strict=True))
    return y, x


def _frame(look: Look, behind: np.ndarray, size: float, place: tuple[float, float]) -> np.ndarray:
    y, x = _thing_axes(size, place, len(behind))
    inside = SHAPES[look.shape](y, x)
    second = inside & TEXTURES[look.texture](y, x)
    shares = [_averaged(mask)[..., None] for mask in (inside, second)]
    first_colour, second_colour = (np.asarray(rgb, np.float32) for rgb in (look.colour, look.second_colour))
    frame = behind * (1 - shares[0]) + first_colour * (shares[0] - shares[1]) + second_colour * shares[1]
    return np.rint(frame).astype(np.uint8)


def _averaged(mask: np.ndarray) -> np.ndarray:
    """Mask `FINER*h FINER*w` -> share of each pixel, float32 `h w`."""
    cells = mask.view(np.uint8)
    rows = sum((cells[start::FINER] for start in range(1, FINER)), cells[::FINER])
    both = sum((rows[:, start::FINER] for start in range(1, FINER)), rows[:, ::FINER])
    return both.astype(np.float32) / FINER**2
