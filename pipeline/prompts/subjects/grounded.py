"""Finds subjects by their words: a detector's box for each, a segmenter's mask in it, CLIP's second look.

    phrase x frame ─▶ boxes ─▶ one, not too small, nobody else's ─▶ mask ─▶ whole ─▶ the phrase, says CLIP

The rules are those of Phantom-Data (frames at 5, 50 and 95 %, phrases with several boxes left out, share of the
picture, overlap, a recheck of the cut-out) with CLIP where it asks a language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from infra.clip import Clip
from pipeline.prompts.subjects import cutout
from pipeline.prompts.subjects.entities import Entity
from pipeline.prompts.subjects.mask import MAX_BORDER_FRAC, SubjectMask, border_frac
from pipeline.prompts.subjects.saliency import MIN_LEAD, SIDE_PX, TEMPLATE
from pipeline.prompts.subjects.verdict import Found, Phrases, Reason, Rejected, Verdict

if TYPE_CHECKING:
    from infra.grounding import Boxes


@dataclass(frozen=True)
class Rules:
    """What a box, a mask and a cut-out must be."""

    min_box_score: float
    min_mask_score: float
    box_frac: tuple[float, float]
    min_side_px: int
    max_iou: float
    min_similarity: float


class BoxFinder(Protocol):
    """`infra.grounding.Detector`, or what stands in for it."""

    def find(
        self, pictures: Sequence[Image.Image], phrases: Sequence[str], *, min_score: float, batch_size: int
    ) -> list["Boxes"]:
        """What each picture shows of the phrase at the same place."""
        ...


class MaskFinder(Protocol):
    """`infra.grounding.Segmenter`, or what stands in for it."""

    def masks(self, picture: Image.Image, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bool `n h w` of what is in the boxes `n 4`, and how sure it is."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A phrase's box in a frame, before it is cut out."""

    entity: Entity
    box: np.ndarray
    score: float
    mask: np.ndarray | None


class GroundedFinder:
    """Looks for every phrase in every frame; frames and phrases go through the detector together."""

    def __init__(
        self,
        detector: BoxFinder,
        segmenter: MaskFinder | None,
        clip: Clip,
        rules: Rules,
        batch_size: int = 16,
    ) -> None:
        """`segmenter` None: the detector gives masks itself."""
        self.detector, self.segmenter, self.clip = detector, segmenter, clip
        self.rules, self.batch_size = rules, batch_size

    def find(self, frames: Sequence[np.ndarray], phrases: Phrases) -> list[Verdict]:
        """As `verdict.Finder`: one verdict for each frame and phrase."""
        pictures = [Image.fromarray(frame) for frame in frames]
        pairs = [(picture, entity.text) for picture in pictures for entity in phrases.subjects]
        found = self.detector.find(
            [picture for picture, _ in pairs],
            [words for _, words in pairs],
            min_score=self.rules.min_box_score,
            batch_size=self.batch_size,
        )
        verdicts: list[Verdict] = []
        each = len(phrases.subjects)
        for number, frame in enumerate(frames):
            boxes = found[number * each : (number + 1) * each]
            verdicts += self._judge(number, frame, boxes, phrases)
        return verdicts

    def _judge(self, number: int, frame: np.ndarray, found: list["Boxes"], phrases: Phrases) -> list[Verdict]:
        """The verdicts of one frame, in the order of the phrases."""
        reasons: dict[Entity, Reason] = {}
        chosen: list[Candidate] = []
        for entity, boxes in zip(phrases.subjects, found, strict=True):
            one = choose_box(entity, boxes, frame.shape[:2], self.rules)
            if isinstance(one, Reason):
                reasons[entity] = one
            else:
                chosen.append(one)
        for entity in same_boxes(chosen, self.rules.max_iou):
            reasons[entity] = Reason.SAME_BOX
        cut: dict[Entity, tuple[SubjectMask, float]] = {}
        alone = [one for one in chosen if one.entity not in reasons]
        for one, mask in zip(alone, self._masks(frame, alone), strict=True):
            if isinstance(mask, Reason):
                reasons[one.entity] = mask
            else:
                cut[one.entity] = (mask, one.score)
        reasons |= self._recheck(frame, {entity: mask for entity, (mask, _) in cut.items()}, phrases)
        return [
            Rejected(entity, number, reasons[entity], cut[entity][0] if entity in cut else None)
            if entity in reasons
            else Found(entity, number, *cut[entity])
            for entity in phrases.subjects
        ]

    def _masks(self, frame: np.ndarray, chosen: list[Candidate]) -> list[SubjectMask | Reason]:
        if not chosen:
            return []
        if self.segmenter is None:
            return [whole_mask(one.mask, self.rules) for one in chosen]
        boxes = np.stack([one.box for one in chosen])
        masks, scores = self.segmenter.masks(Image.fromarray(frame), boxes)
        return [
            whole_mask(mask, self.rules) if score >= self.rules.min_mask_score else Reason.NO_MASK
            for mask, score in zip(masks, scores, strict=True)
        ]

    def _recheck(
        self, frame: np.ndarray, cut: dict[Entity, SubjectMask], phrases: Phrases
    ) -> dict[Entity, Reason]:
        """The cut-outs that CLIP takes for another phrase of the caption, or for nothing of it."""
        if not cut:
            return {}
        pictures = [cutout.subject_picture(frame, mask, SIDE_PX) for mask in cut.values()]
        texts = self.clip.encode_texts([TEMPLATE.format(entity.text) for entity in phrases.entities])
        similarity = self.clip.encode_images(pictures) @ texts.T
        verdicts = {
            entity: recheck(row, phrases.entities.index(entity), self.rules.min_similarity)
            for entity, row in zip(cut, similarity, strict=True)
        }
        return {entity: reason for entity, reason in verdicts.items() if reason is not None}


def choose_box(entity: Entity, found: "Boxes", size: tuple[int, int], rules: Rules) -> Candidate | Reason:
    """The one box of a phrase in a frame of `size` (height, width), or why there is none.

    Boxes of the same thing are one; boxes of two things leave open which of them the word means.
    """
    edges = np.array([size[1], size[0]] * 2, np.float32)
    boxes = found.boxes.clip(0, edges)
    if not len(boxes):
        return Reason.NO_BOX
    if len(suppress(boxes, rules.max_iou)) > 1:
        return Reason.AMBIGUOUS
    wrong = wrong_size(boxes[0].tolist(), size, rules)
    if wrong is not None:
        return wrong
    mask = None if found.masks is None else found.masks[0]
    return Candidate(entity, boxes[0], float(found.scores[0]), mask)


def wrong_size(box: Sequence[float], size: tuple[int, int], rules: Rules) -> Reason | None:
    """Is a box (left, top, right, bottom) too small or too large for a frame of `size` (height, width)?"""
    left, top, right, bottom = box
    frac = (right - left) * (bottom - top) / (size[0] * size[1])
    if frac < rules.box_frac[0] or min(right - left, bottom - top) < rules.min_side_px:
        return Reason.TOO_SMALL
    return Reason.TOO_LARGE if frac > rules.box_frac[1] else None


def suppress(boxes: np.ndarray, max_iou: float) -> list[int]:
    """Places of the boxes `n 4`, surest first, that no surer one covers by more than `max_iou`."""
    kept: list[int] = []
    for place, box in enumerate(boxes):
        if all(overlap(box, boxes[other]) <= max_iou for other in kept):
            kept.append(place)
    return kept


def same_boxes(chosen: Sequence[Candidate], max_iou: float) -> list[Entity]:
    """Phrases whose box a surer phrase has: one thing can't stand for both."""
    order = sorted(chosen, key=lambda one: -one.score)
    kept = suppress(np.stack([one.box for one in order]), max_iou) if order else []
    return [one.entity for place, one in enumerate(order) if place not in kept]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(sides.clip(0)))
    union = float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])) - shared
    return shared / union if union > 0 else 0.0


def whole_mask(mask: np.ndarray | None, rules: Rules) -> SubjectMask | Reason:
    """A mask, bool `h w`, as a subject, or why it is none: in its box the segmenter may see a logo alone."""
    if mask is None or not mask.any():
        return Reason.NO_MASK
    if border_frac(mask) > MAX_BORDER_FRAC:
        return Reason.CUT_OFF
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return wrong_size(box, mask.shape[:2], rules) or SubjectMask(mask.astype(np.float32), box)


def recheck(similarity: np.ndarray, own: int, min_similarity: float) -> Reason | None:
    """Why a cut-out is not its phrase: `similarity` to all of the caption's, that at `own` is its own."""
    others = np.delete(similarity, own)
    if len(others) and similarity[own] - others.max() < MIN_LEAD:
        return Reason.OTHER_WORD
    return Reason.UNLIKE if similarity[own] < min_similarity else None
