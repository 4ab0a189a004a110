"""Finds subjects without a detector: what stands out, when it is surely what the caption speaks of first.

Without CLIP the first subject that the caption names is taken to be what the camera shows: fit for a corpus
whose words no CLIP knows, like the world's. With CLIP a pair is kept only when it is sure, few and right:

    the caption   its first subject is one thing, and no other like it is named
    the mask      one piece, that the network is sure of (`MIN_CERTAINTY`, `MAX_UNSURE`)
    a person      her face is in the mask, and no other
    a thing       is near the phrase (`MIN_SIMILARITY`), nearer than all else that the caption names, and than
                  its parts (`PARTS`: the wheel of a car), and has no human face

Measured on labelled cut-outs: `tests/bench/bench_subjects.py`.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from infra.clip import OFFLINE, Clip
from pipeline.prompts.subjects import cutout
from pipeline.prompts.subjects.entities import Entity, is_request, somebody_acts
from pipeline.prompts.subjects.faces import Box, find_faces
from pipeline.prompts.subjects.mask import Segmenter, SubjectMask, find_subjects
from pipeline.prompts.subjects.verdict import Found, Phrases, Reason, Rejected, Verdict

TEMPLATE = "a photo of a {}"
"""The plainest of the templates with which CLIP was evaluated (Radford et al. 2021)."""
MIN_LEAD = 0.01
"""Least lead over the nearest other word, cosine. Ours."""
SIDE_PX = 336
"""Side of a cut-out, longer side of a background, least longer side of a first frame: as VIMI's own reference
files."""


MIN_CERTAINTY, MAX_UNSURE = 0.90, 0.35
"""Least mean saliency inside the mask; most pixels of the frame that are neither in nor out (0.2 to 0.8), as a
share of the mask. Ours, on labelled cut-outs."""
MIN_SIMILARITY = {OFFLINE: 0.4}
"""Least cosine of a thing's cut-out and its phrase, for each CLIP by name. Ours, on labelled cut-outs."""
OTHER_CLIPS = 0.24
"""The same of a contrastive CLIP, whose cosines are smaller: about where ViT-B/32 has true pairs (LAION kept
0.28 and more). Ours."""
MAX_FACE_FRAC, MIN_FACE_FRAC = 0.6, 0.1
"""A face lies in the upper part of the cut-out; its least side, as a share of the cut-out's longer. Ours."""
MAX_FILL = 0.85
"""Greatest share of its box that a person's cut-out fills: more is a window with her in it. Ours."""
PARTS = ("car wheel", "tire", "hand", "finger", "hair", "text on a screen", "logo")
"""What a cut-out often shows in place of the whole."""


class SaliencyFinder:
    """Names what stands out."""

    def __init__(self, mask_model: str, clip: Clip | None, max_subjects: int) -> None:
        self.segmenter, self.clip, self.max_subjects = Segmenter(mask_model), clip, max_subjects

    def find(self, frames: Sequence[np.ndarray], phrases: Phrases) -> list[Verdict]:
        """As `verdict.Finder`; only the first phrase is looked for.

        With CLIP all frames are looked at and the score says which is surest; without, the first that serves.
        """
        if self.clip is None:
            return self._find_unjudged(frames, phrases)
        first, *others = phrases.subjects
        verdicts: list[Verdict] = [Rejected(entity, 0, Reason.NOT_LOOKED_FOR) for entity in others]
        reason = unclear(phrases)
        if reason is not None:
            return [Rejected(first, 0, reason), *verdicts]
        return [*(self._judge(frame, number, first, phrases) for number, frame in enumerate(frames)), *verdicts]

    def _find_unjudged(self, frames: Sequence[np.ndarray], phrases: Phrases) -> list[Verdict]:
        if phrases.named_together:
            return [Rejected(entity, 0, Reason.TOGETHER) for entity in phrases.subjects]
        verdicts: list[Verdict] = []
        first, *others = phrases.subjects
        for number, frame in enumerate(frames):
            masks = find_subjects(self.segmenter.saliency(frame))
            if isinstance(masks, str):
                verdicts += [Rejected(entity, number, Reason(masks)) for entity in phrases.subjects]
                continue
            verdicts.append(Found(first, number, masks[0], 1.0))
            verdicts += [Rejected(entity, number, Reason.NOT_LOOKED_FOR) for entity in others]
            break
        return verdicts

    def _judge(self, frame: np.ndarray, number: int, first: Entity, phrases: Phrases) -> Verdict:
        """Is what stands out in this frame surely `first`?"""
        saliency = self.segmenter.saliency(frame)
        masks = find_subjects(saliency)
        if isinstance(masks, str):
            return Rejected(first, number, Reason(masks))
        if not is_certain(saliency, masks[0]):
            return Rejected(first, number, Reason.UNCERTAIN, masks[0])
        if first.is_person:
            return judge_person(frame, number, first, masks[0])
        return self._judge_thing(frame, number, first, masks[0], phrases)

    def _judge_thing(
        self, frame: np.ndarray, number: int, first: Entity, mask: SubjectMask, phrases: Phrases
    ) -> Verdict:
        assert self.clip is not None
        if any(_is_inside(face, mask) for face in find_faces(frame)):
            return Rejected(first, number, Reason.OTHER_WORD, mask)  # "a couple are on a computer"
        crop = Image.fromarray(frame).crop(mask.box)
        vectors = self.clip.encode_images([cutout.subject_picture(frame, mask, SIDE_PX), crop])
        others = [*(entity.text for entity in phrases.entities if entity is not first), *PARTS]
        texts = self.clip.encode_texts([TEMPLATE.format(words) for words in (first.text, first.head, *others)])
        both = vectors.sum(0) / np.linalg.norm(vectors.sum(0))
        own, other = float((texts[:2] @ both).max()), float((texts[2:] @ both).max())
        if own < MIN_SIMILARITY.get(self.clip.name, OTHER_CLIPS) or own - other < MIN_LEAD:
            return Rejected(first, number, Reason.NOT_FIRST, mask)
        return Found(first, number, mask, own)


def unclear(phrases: Phrases) -> Reason | None:
    """Why the caption leaves open what a single mask shows; None = it is clear."""
    named = [entity for entity in phrases.entities if entity.kind == "subject"]
    first = phrases.subjects[0]
    caption = phrases.caption
    if named[0] is not first or is_request(caption) or somebody_acts(caption, first.start):
        return Reason.NO_SUBJECT  # "two butterflies on a red flower", "Put the pen in the bowl"
    if phrases.named_together:
        return Reason.TOGETHER
    alike = [e for e in named[1:] if e.head == first.head or (first.is_person and e.nature == "living")]
    return Reason.TOGETHER if alike else None  # a cat that she holds has a face too


def is_certain(saliency: np.ndarray, mask: SubjectMask) -> bool:
    """Was the network sure of this mask, and of nothing else?"""
    inside = mask.alpha > 0.5
    unsure = ((saliency > 0.2) & (saliency < 0.8)).sum()
    return bool(saliency[inside].mean() >= MIN_CERTAINTY and unsure <= MAX_UNSURE * inside.sum())


def judge_person(frame: np.ndarray, number: int, first: Entity, mask: SubjectMask) -> Verdict:
    """A person is known by one face, whole and inside the mask."""
    left, top, right, bottom = mask.box
    if (mask.alpha > 0.5).sum() > MAX_FILL * (right - left) * (bottom - top):
        return Rejected(first, number, Reason.UNCERTAIN, mask)
    faces = [face for face in find_faces(frame) if _is_inside(face, mask)]
    if len(faces) > 1:
        return Rejected(first, number, Reason.SEVERAL, mask)
    if not faces:
        return Rejected(first, number, Reason.NOT_FIRST, mask)
    left, top, right, bottom = faces[0]
    return Found(first, number, mask, min(1.0, (right - left) * (bottom - top) / mask.alpha.size * 10))


def _is_inside(face: Box, mask: SubjectMask) -> bool:
    """Does the mask hold the middle of the face, high up and large enough?"""
    left, top, right, bottom = (round(edge) for edge in face)
    x0, y0, x1, y1 = mask.box
    is_small = right - left < MIN_FACE_FRAC * max(x1 - x0, y1 - y0)
    if is_small or (top + bottom) / 2 > y0 + MAX_FACE_FRAC * (y1 - y0):
        return False
    height, width = bottom - top, right - left
    middle = mask.alpha[top + height // 4 : bottom - height // 4, left + width // 4 : right - width // 4]
    return middle.size > 0 and float(middle.mean()) > 0.8
