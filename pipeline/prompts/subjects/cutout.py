"""Cuts pictures out of a frame by a mask: the subject on white, the background without the subject.

VIMI's own reference files are 336 x 336 cut-outs on white for people and plain crops for scenes (read
off the project page); the figure shows the background as a crop that the subject is not in.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from infra.pictures import fit_inside
from pipeline.prompts.subjects.entities import Entity
from pipeline.prompts.subjects.mask import SubjectMask
from pipeline.schema import Role

WHITE, BLACK = 255, 24
MARGIN_FRAC = 0.04
"""Air around a cut-out, share of its longer side."""
MIN_CROP_FRAC = 0.2
"""A crop shows the place only if it covers at least this share of the frame; else we fill the hole."""


@dataclass(frozen=True)
class Picture:
    """A picture that stands for the words of an entity."""

    entity: Entity
    role: Role
    image: bytes


def subject_picture(frame: np.ndarray, mask: SubjectMask, side_px: int) -> Image.Image:
    """The subject alone, on a white square of `side_px` pixels.

    Args:
        frame: uint8 `h w 3`.
        mask: of the same size.
        side_px: side of the result.
    """
    alpha = mask.alpha[..., None]
    flat = frame * alpha + WHITE * (1 - alpha)
    left, top, right, bottom = mask.box
    cut = Image.fromarray(flat.round().astype(np.uint8)[top:bottom, left:right])
    longest = max(cut.size)
    scale = side_px * (1 - 2 * MARGIN_FRAC) / longest
    size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    canvas = Image.new("RGB", (side_px, side_px), (WHITE,) * 3)
    cut = cut.resize(size, Image.Resampling.LANCZOS)
    canvas.paste(cut, ((side_px - size[0]) // 2, (side_px - size[1]) // 2))
    return canvas


def background_picture(frame: np.ndarray, masks: list[SubjectMask], side_px: int) -> Image.Image:
    """The place without the subjects: the widest crop beside them, or the frame with the holes filled."""
    x0, y0, x1, y1 = content_box(frame)
    left, top, right, bottom = _around([mask.box for mask in masks])
    crops = [(x0, y0, left, y1), (right, y0, x1, y1), (x0, y0, x1, top), (x0, bottom, x1, y1)]
    best = max(crops, key=_usable_area)
    if _usable_area(best) >= MIN_CROP_FRAC * (x1 - x0) * (y1 - y0):
        picture = Image.fromarray(frame).crop(best)
    else:
        filled = fill_hole(frame, np.max([mask.alpha for mask in masks], axis=0) > 0.05)
        picture = Image.fromarray(filled).crop((x0, y0, x1, y1))
    return fit_inside(picture, side_px)


def _around(boxes: list[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    """The box around all boxes."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _usable_area(box: tuple[int, int, int, int]) -> int:
    """Area of a crop; slivers, of which nobody can tell the place, count nothing."""
    width, height = max(box[2] - box[0], 0), max(box[3] - box[1], 0)
    return width * height if min(width, height) * 2 >= max(width, height) else 0


def content_box(frame: np.ndarray) -> tuple[int, int, int, int]:
    """The frame without black bars (left, top, right, bottom); the whole frame when it is all dark."""
    bright = frame.max(-1) > BLACK
    rows, columns = np.flatnonzero(bright.mean(1) > 0.02), np.flatnonzero(bright.mean(0) > 0.02)
    if not len(rows) or not len(columns):
        return 0, 0, frame.shape[1], frame.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def fill_hole(frame: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Fill the masked pixels from coarser and coarser averages of the rest (push-pull).

    Args:
        frame: uint8 `h w 3`.
        hole: bool `h w`.
    """
    keep = (~hole).astype(np.float64)
    filled = _push_pull(frame * keep[..., None], keep)
    return np.where(hole[..., None], filled.clip(0, 255).round(), frame).astype(np.uint8)


def _push_pull(colour: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Colours (already times weight) where known, coarser colours where not."""
    height, width = weight.shape
    known = weight[..., None]
    mean = np.divide(colour, known, out=np.zeros_like(colour), where=known > 0)
    if known.all() or min(height, width) < 2:
        return mean
    odd = ((0, height % 2), (0, width % 2))
    coarse_weight = _halve(np.pad(weight, odd)[..., None])[..., 0]
    coarse = _push_pull(
        _halve(np.pad(colour, (*odd, (0, 0)))) / np.maximum(coarse_weight, 1)[..., None],
        np.minimum(coarse_weight, 1),
    )
    pulled = _smooth(coarse.repeat(2, 0).repeat(2, 1))[:height, :width]
    return mean * known + pulled * (1 - known)


def _halve(x: np.ndarray) -> np.ndarray:
    return x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]


def _smooth(x: np.ndarray) -> np.ndarray:
    """Blur by (1 2 1) along both sides: doubled pixels become a ramp."""
    for axis in (0, 1):
        padded = np.pad(x, [(1, 1) if side == axis else (0, 0) for side in range(3)], mode="edge")
        one, two, three = (np.take(padded, range(i, i + x.shape[axis]), axis) for i in range(3))
        x = (one + 2 * two + three) / 4
    return x


def encode(picture: Image.Image) -> bytes:
    """JPEG bytes (quality 92), without metadata: equal pictures give equal bytes."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
