"""What a finder says of a caption's phrases in a clip's frames: found here, or not found for this reason.

`Finder` is the protocol; saliency.py and grounded.py keep it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from pipeline.prompts.subjects.entities import Entity, find_entities, named_together, subjects
from pipeline.prompts.subjects.mask import SubjectMask


class Reason(StrEnum):
    """Why a phrase gets no picture."""

    NO_SUBJECT = "the caption names no single subject"
    TOGETHER = "the caption names two subjects together"
    # of what stands out
    NOT_LOOKED_FOR = "not looked for: without a detector only what the caption names first is"
    NOTHING_SALIENT = "nothing salient"
    SEVERAL = "several subjects"
    UNCERTAIN = "mask uncertain"
    NOT_FIRST = "the largest cut-out is not clearly the first thing that the caption names"
    # of what is grounded
    NO_BOX = "the detector finds no such thing"
    AMBIGUOUS = "the detector finds several such things"
    SAME_BOX = "the box is another phrase's"
    NO_MASK = "the segmenter is not sure of the thing in the box"
    UNLIKE = "the cut-out is too unlike its phrase"
    # of a place
    NOTHING_CUT = "nothing was cut out, so that the place can't be shown without it"
    NOT_ALL_CUT = "not all that the caption names was cut out, so that the place may still show it"
    # of both
    TOO_SMALL = "subject too small"
    TOO_LARGE = "subject too large"
    CUT_OFF = "subject cut off"
    OTHER_WORD = "the cut-out is not clearly this phrase, but another or none of the caption's"


def main_reason(reasons: Sequence[str]) -> str:
    """Why a clip gives no picture: the most frequent reason of what was looked for."""
    told = [reason for reason in reasons if reason != Reason.NOT_LOOKED_FOR] or list(reasons)
    return max(told, key=told.count)


@dataclass(frozen=True)
class Phrases:
    """What a caption names, in its order."""

    caption: str
    entities: tuple[Entity, ...]
    """All: places and plurals compete for a cut-out, and win nothing."""
    subjects: tuple[Entity, ...]
    """Those that a cut-out may replace."""

    @classmethod
    def of(cls, caption: str) -> "Phrases":
        entities = find_entities(caption)
        return cls(caption, tuple(entities), tuple(subjects(entities)))

    @property
    def named_together(self) -> bool:
        return named_together(self.caption, list(self.entities))


@dataclass(frozen=True)
class Found:
    """A phrase and where it is in one frame."""

    entity: Entity
    frame: int
    """Place among the frames that were given."""
    mask: SubjectMask
    score: float
    """How sure the finder is, 0..1; of one finder's pictures only."""


@dataclass(frozen=True)
class Rejected:
    """A phrase that a frame gives no picture for."""

    entity: Entity
    frame: int
    reason: Reason
    mask: SubjectMask | None = None
    """What was cut out and left out again, if it came that far."""


Verdict = Found | Rejected


class Finder(Protocol):
    """Looks for a caption's subjects in frames of its clip."""

    def find(self, frames: Sequence[np.ndarray], phrases: Phrases) -> list[Verdict]:
        """At least one verdict for each of `phrases.subjects`, frame by frame.

        Frames are uint8 `h w 3`, best first: a finder may stop at the first that serves.
        """
        ...
