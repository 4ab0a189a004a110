"""Finds subjects without a detector: what stands out is what the caption speaks of first.

Without CLIP the first subject that the caption names is taken to be what the camera shows. That holds for
"a dog is playing in the grass" and fails for "a person mixing chocolate in a bowl", where the bowl fills
the picture. With CLIP each cut-out gets the word whose text is nearest; a frame is left out whose largest
cut-out is not clearly that first subject, and so is a further one that is nearest to no usable word, or as near
to two (Phantom-Data rechecks its pairs in the same spirit, by a vision-language model).
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from infra.clip import Clip
from infra.storage import sha256_file
from pipeline.prompts.subjects import cutout
from pipeline.prompts.subjects.entities import Entity
from pipeline.prompts.subjects.mask import Segmenter, SubjectMask, find_subjects, model_path
from pipeline.prompts.subjects.verdict import Found, Phrases, Reason, Rejected, Verdict

TEMPLATE = "a photo of a {}"
"""The plainest of the templates with which CLIP was evaluated (Radford et al. 2021)."""
MIN_LEAD = 0.01
"""Least lead of the nearest word over the second, cosine. Ours."""
SIDE_PX = 336
"""Side of a cut-out, longer side of a background or a first frame: as VIMI's own reference files."""


class SaliencyFinder:
    """Names what stands out in the first frame that serves."""

    def __init__(self, mask_model: str, clip: Clip | None, max_subjects: int) -> None:
        self.segmenter, self.clip, self.max_subjects = Segmenter(mask_model), clip, max_subjects

    @property
    def identity(self) -> dict[str, str]:
        return {"mask_model": sha256_file(str(model_path(self.segmenter.model)))}

    def find(self, frames: Sequence[np.ndarray], phrases: Phrases) -> list[Verdict]:
        """As `verdict.Finder`; in the frames before the first that serves, all phrases share its reason."""
        if self.clip is None and phrases.named_together:
            return [Rejected(entity, 0, Reason.TOGETHER) for entity in phrases.subjects]
        verdicts: list[Verdict] = []
        for number, frame in enumerate(frames):
            found = self._find_in(frame, phrases)
            if isinstance(found, Reason):
                verdicts += [Rejected(entity, number, found) for entity in phrases.subjects]
                continue
            for entity in phrases.subjects:
                mask = found.get(entity)
                verdicts.append(
                    Found(entity, number, mask, 1.0) if mask else Rejected(entity, number, Reason.OTHER_WORD)
                )
            break
        return verdicts

    def _find_in(self, frame: np.ndarray, phrases: Phrases) -> dict[Entity, SubjectMask] | Reason:
        """Named masks of one frame, or why there are none.

        What stands out is mostly what the caption speaks of first, whatever word CLIP finds nearest: nine of
        the demo's eleven wrong cut-outs bore a later word, like "microphone" for the man who sings into it.
        """
        usable = phrases.subjects
        at_most = min(self.max_subjects, len(usable)) if self.clip else 1
        masks = find_subjects(self.segmenter.saliency(frame), at_most=at_most)
        if isinstance(masks, str):
            return Reason(masks)
        if self.clip is None:
            return {usable[0]: masks[0]}
        cuts = [cutout.subject_picture(frame, mask, SIDE_PX) for mask in masks]
        names = name_pictures(cuts, phrases.entities, usable, self.clip)
        if names[0] != usable[0]:
            return Reason.NOT_FIRST
        return {name: mask for name, mask in zip(names, masks, strict=True) if name is not None}


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
