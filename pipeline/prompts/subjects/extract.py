"""From a caption and some frames to pictures that stand for words: entities, masks, cut-outs, names."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from pydantic import Field

from infra.clip import Clip, ClipConfig
from infra.config import Config
from pipeline.prompts.subjects import cutout
from pipeline.prompts.subjects.cutout import Picture
from pipeline.prompts.subjects.entities import Entity, background, find_entities, named_together, subjects
from pipeline.prompts.subjects.mask import MaskConfig, Segmenter, SubjectMask, find_subjects
from pipeline.prompts.subjects.naming import name_pictures
from pipeline.schema import Role


class SubjectConfig(Config):
    """How the words of a caption become pictures."""

    mask: MaskConfig = MaskConfig()
    """The segmentation network and what counts as a subject."""
    clip: ClipConfig | None = None
    """Names each cut-out: which of the caption's words is it? None = the first subject named, and
    captions that name two together are left out."""
    min_lead: float = Field(default=0.01, ge=0, le=1)
    """Least lead of the nearest word over the second, cosine. Ours; only with `clip`."""
    max_subjects: int = Field(default=3, ge=1, le=16)
    """Most subjects of one prompt (Video Alchemist: 1-3). More than one needs `clip`."""
    background_prob: float = Field(default=0.5, ge=0, le=1)
    """Probability that a place that the caption names becomes a picture too (Video Alchemist: 50 %)."""
    frame_fracs: tuple[float, ...] = (0.05, 0.5, 0.95)
    """Where in the clip subjects are looked for, in an order drawn per clip; the first good one is
    taken. Video Alchemist and Phantom-Data: 5, 50 and 95 %."""
    side_px: int = Field(default=336, ge=32, le=2048)
    """Side of a cut-out, longer side of a background, pixels. 336: VIMI's own reference files."""
    picture_format: cutout.PictureFormat = "jpeg"
    """`jpeg` (quality 92) or `png` (as VIMI's reference files, some four times larger)."""


class SubjectFinder:
    """Holds the networks of a worker; loaded at the first use."""

    def __init__(self, config: SubjectConfig) -> None:
        self.config = config
        self.segmenter = Segmenter(config.mask)
        self._clip: Clip | None = None

    @property
    def clip(self) -> Clip | None:
        if self._clip is None and self.config.clip is not None:
            from infra.clip import load_clip

            self._clip = load_clip(self.config.clip)
        return self._clip

    def find(
        self, caption: str, frames: Sequence[np.ndarray], random: np.random.Generator
    ) -> list[Picture] | str:
        """Pictures for the caption's subjects (at least one) and perhaps its place, or why there are none.

        Args:
            caption: as found.
            frames: uint8 `h w 3` each, in the order of `frame_fracs`.
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
        """Named masks of one frame, or why there are none."""
        at_most = min(self.config.max_subjects, len(usable)) if self.clip else 1
        masks = find_subjects(self.segmenter.saliency(frame), self.config.mask, at_most=at_most)
        if isinstance(masks, str):
            return masks
        if self.clip is None:
            return [(usable[0], masks[0])]
        cuts = [cutout.subject_picture(frame, mask, self.config.side_px) for mask in masks]
        names = name_pictures(cuts, entities, usable, self.clip, self.config.min_lead)
        named = [(name, mask) for name, mask in zip(names, masks, strict=True) if name is not None]
        return named or "the cut-out is none of the caption's words"

    def _pictures(
        self, frame: np.ndarray, found: list[tuple[Entity, SubjectMask]], place: Entity | None
    ) -> list[Picture]:
        side_px = self.config.side_px

        def picture(entity: Entity, role: Role, image: Image.Image) -> Picture:
            return Picture(entity, role, cutout.encode(image, self.config.picture_format))

        pictures = [picture(e, Role.SUBJECT, cutout.subject_picture(frame, m, side_px)) for e, m in found]
        if place is not None:
            image = cutout.background_picture(frame, [mask for _, mask in found], side_px)
            pictures.append(picture(place, Role.BACKGROUND, image))
        return pictures
