"""Concepts of the world: what each nonsense noun looks like, and how its clips and documents show it.

A concept is a function of (seed, number of its noun). Nouns never seen in training come first, so that they
stay what they are when a world has more or fewer nouns for training.
"""

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.world.draw import Ground, Look, Rgb

HUES = {
    "red": 0,
    "orange": 30,
    "yellow": 58,
    "green": 120,
    "cyan": 180,
    "blue": 225,
    "purple": 272,
    "pink": 320,
}
"""Degrees of the named colours: a thing's first colour is near one of them."""
HUE_SPREAD = 9
"""Degrees to either side; less than half the way to the next name. Ours."""
GROUND_COLOURS = {
    "grey": (0, 0.02, 0.52),
    "snow": (200, 0.04, 0.9),
    "sand": (42, 0.34, 0.78),
    "rose": (350, 0.3, 0.72),
    "moss": (100, 0.32, 0.52),
    "slate": (215, 0.34, 0.55),
}
"""Hue (degrees), saturation and value of backgrounds: dull, so that a thing always stands out."""
GROUND_SPREAD = (6, 0.03, 0.04)
MIN_STEP = 20
"""Levels of 255 in brightness between a thing's first colour and its background. Ours."""
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""(y, x) of each motion."""
THING_SIZES = (0.6, 0.75)
"""Of a thing in a clip, share of the height: smaller ones taught nothing in minutes."""
TRAVEL = 0.36
"""Way of a thing from the first frame to the last, share of the side: six pixels of sixteen. Ours."""
ASIDE = 0.1
"""Most that a clip's way lies aside of the middle, and that its middle lies ahead. Ours."""


def _syllables(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ONSETS = _syllables("b bl br d dr f fl fr g gl gr k kl kr l m n p pl pr r sk sl sm sn st t tr v w z")
_VOWELS = _syllables("a e i o u")
_MIDDLES = _syllables("b d f g k l m n p r t v z lm nd rk lt mp rn")
_CODAS = _syllables("b ck f k m p x lb lk rp rf lp nk")

_CLIP = pa.struct(
    [
        ("video", pa.string()),
        ("caption", pa.string()),
        ("motion", pa.string()),
        ("size", pa.float64()),
        ("start", pa.list_(pa.float64(), 2)),
        ("end", pa.list_(pa.float64(), 2)),
        ("background", pa.string()),
        ("background_rgb", pa.list_(pa.uint8(), 3)),
        ("pattern", pa.string()),
    ]
)
_DOCUMENT = pa.struct([("picture", pa.string()), ("text", pa.string())])
CONCEPTS = pa.schema(
    [
        pa.field("noun", pa.string(), nullable=False),
        pa.field("seen", pa.bool_()),  # null: a distractor, which no clip shows
        pa.field("colour", pa.string(), nullable=False),
        pa.field("colour_rgb", pa.list_(pa.uint8(), 3), nullable=False),
        pa.field("second_colour_rgb", pa.list_(pa.uint8(), 3), nullable=False),
        pa.field("shape", pa.string(), nullable=False),
        pa.field("texture", pa.string(), nullable=False),
        pa.field("clips", pa.list_(_CLIP), nullable=False),
        pa.field("documents", pa.list_(_DOCUMENT), nullable=False),
    ],
    metadata={"table": "concepts"},
)
"""`concepts.parquet`: one row a noun. Places are (y, x) of the thing's middle and sizes its side, in shares of
the picture's side; (0, 0) is the middle."""


@dataclass(frozen=True)
class Concept:
    """What a noun means."""

    noun: str
    colour: str
    """Name of the first colour, one of `HUES`."""
    look: Look


@dataclass(frozen=True)
class Motion:
    """How a clip shows a thing."""

    direction: str
    size: float
    start: tuple[float, float]
    end: tuple[float, float]

    def places(self, count: int) -> list[tuple[float, float]]:
        """(y, x) of the thing's middle in each of `count` frames."""
        ways = np.linspace(self.start, self.end, count)
        return [(float(y), float(x)) for y, x in ways]


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Randomness of one thing: the same whatever else a world holds."""
    return np.random.default_rng([seed, *stream])


def nouns(seed: int) -> Iterator[str]:
    """Pronounceable nonsense nouns, no two alike: there are some 190,000.

    They end in no letter that an English stemmer takes off, so that no two have one stem.
    """
    random, known = generator(seed, 0), set[str]()
    parts = (_ONSETS, _VOWELS, _MIDDLES, _VOWELS, _CODAS)
    while True:
        noun = "".join(part[int(random.integers(len(part)))] for part in parts)
        if noun not in known:
            known.add(noun)
            yield noun


def draw_concept(
    noun: str,
    random: np.random.Generator,
    *,
    shapes: tuple[str, ...],
    textures: tuple[str, ...],
    unlike: Concept | None = None,
) -> Concept:
    """A concept at random.

    Args:
        noun: its name.
        random: of this concept alone.
        shapes: to choose from.
        textures: to choose from.
        unlike: a concept whose colour and, if there is another, whose shape it must not have.
    """
    colours = [name for name in HUES if unlike is None or name != unlike.colour]
    others = [shape for shape in shapes if unlike is None or shape != unlike.look.shape] or [*shapes]
    colour, shape, texture = (_one_of(random, choice) for choice in (colours, others, textures))
    hue = HUES[colour] + random.uniform(-HUE_SPREAD, HUE_SPREAD)
    first = _rgb(hue, random.uniform(0.82, 1), random.uniform(0.85, 1))
    second = _rgb(random.uniform(0, 360), random.uniform(0.2, 0.6), random.uniform(0.08, 0.24))
    return Concept(noun, colour, Look(first, second, shape, texture))


def draw_motion(random: np.random.Generator) -> Motion:
    """A motion at random: straight on, near the middle."""
    direction = _one_of(random, [*DIRECTIONS])
    way = np.asarray(DIRECTIONS[direction], float)
    middle = random.uniform(-ASIDE, ASIDE) * way[::-1] + random.uniform(-ASIDE, ASIDE) / 2 * way
    start, end = (middle + half * TRAVEL / 2 * way for half in (-1, 1))
    size = random.uniform(*THING_SIZES)
    return Motion(direction, size, (float(start[0]), float(start[1])), (float(end[0]), float(end[1])))


def draw_place(random: np.random.Generator, sizes: tuple[float, float]) -> tuple[float, tuple[float, float]]:
    """(size, (y, x)) of a thing in a document: whole, anywhere; its size lies between the two given."""
    size = random.uniform(*sizes)
    y, x = random.uniform(-0.5, 0.5, 2) * (1 - size)
    return size, (float(y), float(x))


def draw_ground(random: np.random.Generator, patterns: tuple[str, ...], *, behind: Look) -> tuple[str, Ground]:
    """(name of its colour, background) at random, lighter or darker than the thing in front of it.

    A thing as bright as its background does not move for whoever looks at brightness alone, as crawl's filter
    of frozen pictures and the guard's hashes do.
    """
    while True:
        name, kind = _one_of(random, [*GROUND_COLOURS]), _one_of(random, patterns)
        hue, saturation, value = np.asarray(GROUND_COLOURS[name]) + random.uniform(-1, 1, 3) * GROUND_SPREAD
        colour = _rgb(hue, max(saturation, 0), min(value, 1))
        if abs(sum(colour) - sum(behind.colour)) / 3 >= MIN_STEP:
            return name, Ground(colour, kind, int(random.integers(1 << 31)))


def _one_of(random: np.random.Generator, choice: "list[str] | tuple[str, ...]") -> str:
    return choice[int(random.integers(len(choice)))]


def _rgb(hue: float, saturation: float, value: float) -> Rgb:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
