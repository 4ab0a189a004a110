"""Finds faces that look at the camera: a cascade of local binary patterns (Liao et al. 2007), NumPy alone.

The network that names cut-outs offline knows the thousand classes of ImageNet, and no person is among them.
What tells a person from the dog in her arms is then her face. The cascade is OpenCV's, which the scikit-image
wheel carries as data; the wheel is read as an archive and never imported.
"""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from infra.errors import ConfigError
from infra.wheels import wheel_file

WHEEL, WHEEL_FILE = "scikit-image", "skimage/data/lbpcascade_frontalface_opencv.xml"
HEIGHT_PX = 240
"""Frames are looked at with so many rows. Ours."""
SCALE_STEP = 1.15
MIN_NEIGHBOURS = 6
"""Windows that must agree on a face. OpenCV's default is 3, at which vegetables have faces; 6 is ours."""
Box = tuple[float, float, float, float]
"""left, top, right, bottom; pixels of the frame."""


@dataclass(frozen=True)
class Weak:
    """One pattern: its middle block's corner and size in the window, and what each of 256 codes votes."""

    left: int
    top: int
    width: int
    height: int
    votes: np.ndarray


@dataclass(frozen=True)
class Cascade:
    side: int
    stages: list[tuple[float, list[Weak]]]
    """A stage's threshold and its patterns."""


def cascade_path() -> Path:
    """The cascade's file in its wheel.

    Raises:
        ConfigError: the wheel is not installed.
    """
    found = wheel_file(WHEEL, WHEEL_FILE)
    if found is None:
        raise ConfigError(
            "the cascade that finds faces is not installed",
            legal="the wheel that holds it",
            cure=f"pip install --no-deps {WHEEL}==0.26.0",
        )
    return found


@cache
def load_cascade() -> Cascade:
    root = ElementTree.parse(cascade_path()).getroot()[0]
    rects = [tuple(map(int, (r.text or "").split())) for r in root.iterfind("features/_/rect")]
    stages = []
    for stage in root.iterfind("stages/_"):
        weaks = []
        for weak in stage.iterfind("weakClassifiers/_"):
            nodes = [int(n) for n in weak.findtext("internalNodes", "").split()]
            low, high = (float(n) for n in weak.findtext("leafValues", "").split())
            bits = np.array(nodes[3:], np.int32).view(np.uint32)
            codes = np.arange(256)
            is_in = (bits[codes >> 5] >> (codes & 31).astype(np.uint32)) & 1
            left, top, width, height = rects[nodes[2]]
            weaks.append(Weak(left, top, width, height, np.where(is_in == 1, low, high)))
        stages.append((float(stage.findtext("stageThreshold", "0")), weaks))
    return Cascade(int(root.findtext("width", "24")), stages)


def find_faces(frame: np.ndarray) -> list[Box]:
    """Boxes of the faces in `frame`, uint8 `h w 3`, largest first."""
    cascade = load_cascade()
    picture = Image.fromarray(frame).convert("L")
    scale = HEIGHT_PX / picture.height
    windows: list[Box] = []
    while min(picture.height, picture.width) * scale >= cascade.side:
        size = (round(picture.width * scale), round(picture.height * scale))
        grey = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.int32)
        rows, columns = _windows(grey, cascade)
        side = cascade.side / scale
        windows += [
            (c / scale, r / scale, c / scale + side, r / scale + side)
            for r, c in zip(rows, columns, strict=True)
        ]
        scale /= SCALE_STEP
    return _group(windows)


def _windows(grey: np.ndarray, cascade: Cascade) -> tuple[list[int], list[int]]:
    """Top left corners of the windows that pass every stage."""
    total = np.zeros((grey.shape[0] + 1, grey.shape[1] + 1), np.int32)
    total[1:, 1:] = grey.cumsum(0).cumsum(1)
    rows, columns = np.mgrid[: grey.shape[0] - cascade.side + 1, : grey.shape[1] - cascade.side + 1].reshape(
        2, -1
    )
    for threshold, weaks in cascade.stages:
        score = np.zeros(len(rows))
        for weak in weaks:
            score += weak.votes[_codes(total, rows, columns, weak)]
        keep = score >= threshold
        rows, columns = rows[keep], columns[keep]
    return rows.tolist(), columns.tolist()


AROUND = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
"""The eight blocks around the middle one, the code's highest bit first."""


def _codes(total: np.ndarray, rows: np.ndarray, columns: np.ndarray, weak: Weak) -> np.ndarray:
    """Which of the blocks around are at least as bright as the middle one, as 8 bits."""
    corner = [
        [total[rows + weak.top + i * weak.height, columns + weak.left + j * weak.width] for j in range(4)]
        for i in range(4)
    ]

    def block(i: int, j: int) -> np.ndarray:
        return corner[i + 1][j + 1] - corner[i][j + 1] - corner[i + 1][j] + corner[i][j]

    middle, code = block(1, 1), np.zeros(len(rows), np.int32)
    for i, j in AROUND:
        code = code << 1 | (block(i, j) >= middle)
    return code


def _group(windows: list[Box]) -> list[Box]:
    """Windows that overlap by half are one face, if there are enough of them."""
    groups: list[list[Box]] = []
    for window in windows:
        for group in groups:
            if _overlap(group[0], window) > 0.4:
                group.append(window)
                break
        else:
            groups.append([window])
    faces = [tuple(np.mean(group, 0).tolist()) for group in groups if len(group) >= MIN_NEIGHBOURS]
    return sorted(faces, key=lambda box: box[0] - box[2])  # type: ignore[return-value]


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)
