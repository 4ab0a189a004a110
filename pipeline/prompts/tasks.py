"""The tasks of VIMI's second stage: what each makes of a clip, as the segments of a prompt.

    subject-driven    Generate a video with the text and image.        A [dog] is playing in [grass].
    video prediction  Generate a video with the text and first frame.  caption [first frame]
    text-to-video     Generate a video with the retrieved text-image.  retrieved text [picture] caption

`RECIPES` is the registry: a further task is a function and an entry. Words are replaced by pictures in place:
the text segments and the words behind the pictures, joined, are the caption.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from infra.pictures import fit_inside
from pipeline.media.clip import first_frame, read_frames
from pipeline.prompts.subjects.crops import as_picture, own_pictures
from pipeline.prompts.subjects.cutout import Picture, encode
from pipeline.prompts.subjects.finder import FRAME_FRACS, SIDE_PX, SubjectFinder
from pipeline.prompts.subjects.pairs import Pairs, Tally, cross_references
from pipeline.prompts.subjects.verdict import main_reason
from pipeline.schema import TASKS, Media, Role, RowError, Status, TargetKind, Task

Row = dict[str, Any]
Segment = dict[str, Any]
MAX_PICTURES = 8
"""Of a prompt: more than the generator sees itself (`model.condition.MAX_REFERENCES`) would be lost there."""
MAX_FIRST_PX = 2048
"""Longest side of a first frame whose target is read from the source: 1080p whole, and no more than training
may decode. Ours."""


@dataclass(frozen=True)
class Choice:
    """Which of the crops stand for a clip's words; the fields are those of `InstructConfig`."""

    crops: list[Row]
    """Of the clip, or of all clips of its source video, and of the documents that were retrieved for them."""
    max_subjects: int
    background_prob: float
    pairs: Pairs
    similarity: tuple[float, float]
    references: int
    tally: Tally = field(default_factory=Tally)
    """What was compared for cross-pairs is counted here."""


@dataclass(frozen=True)
class Draw:
    """A clip that was drawn for a task, and what its worker has at hand."""

    row: Row
    """Of `schema.PROMPTS`, as augment made it."""
    local_uri: str | None
    """Where the source's bytes lie, if not at `source_uri`."""
    finder: SubjectFinder
    """Finds pictures that stand for words; loads its networks at the first use."""
    seed: int
    choice: Choice | None = None
    """None = there is no table of crops: cut-outs are made here, of the clip itself."""

    @property
    def caption(self) -> str:
        return self.row["caption"]


Made = tuple[list[Segment], list[str]]
"""What follows the instruction line, and the row's flags."""


@dataclass(frozen=True)
class Recipe:
    """How a task's prompt is made."""

    instruction: str
    """The line in front."""
    make: Callable[[Draw], Made]
    """Makes the rest; raises RowError where the clip can't serve the task."""


def subject_driven(draw: Draw) -> Made:
    """The caption with its subjects, and perhaps its place, shown instead of named."""
    if draw.choice is not None:
        return _from_crops(draw, draw.choice)
    found = read_frames(draw.row, FRAME_FRACS, local_uri=draw.local_uri)
    random = generator(draw.seed, draw.row["clip_id"], "subject")
    pictures = draw.finder.find(draw.caption, list(found.frames), random)
    if isinstance(pictures, str):
        raise RowError(Status.FILTERED_NO_SUBJECT, pictures)
    return replace_words(draw.caption, pictures[:MAX_PICTURES]), _frame_flags(found.from_target)


def _from_crops(draw: Draw, choice: Choice) -> Made:
    """The same out of the table of crops; there the references may be of another place."""
    random = generator(draw.seed, draw.row["clip_id"], "subject")
    random.permutation(len(FRAME_FRACS))  # the order of frames, as it was drawn for the table
    with_place = random.random() < choice.background_prob
    own = [crop for crop in choice.crops if crop["clip_id"] == draw.row["clip_id"] and crop["doc_id"] is None]
    targets = own_pictures(own, at_most=choice.max_subjects)
    if not targets:
        raise _nothing_shown(own)
    shown: list[list[Row]] = []
    for target in targets:
        references = _references(choice, target, own)
        count = 1 + int(random.integers(min(choice.references, len(references)))) if references else 0
        shown.append(references[:count])
    if not any(shown):
        raise RowError(Status.FILTERED_NO_SUBJECT, "no other clip shows it, like enough and unlike enough")
    places = [crop for crop in own if crop["nature"] == "place" and crop["status"] == Status.OK]
    places = [crop for crop in places if with_place and crop["frac"] == targets[0]["frac"]]
    shown = thinned(shown, MAX_PICTURES - len(places))
    pictures = [
        as_picture(target, draw.caption, Role.SUBJECT, crop)
        for target, crops in zip(targets, shown, strict=True)
        for crop in crops
    ]
    pictures += [as_picture(place, draw.caption, Role.BACKGROUND, place) for place in places]
    is_small = any(crop.get("from_target") for crops in [*shown, places] for crop in crops)
    return replace_words(draw.caption, pictures), _frame_flags(is_small)


def _nothing_shown(own: list[Row]) -> RowError:
    """Why a clip's own crops show none of its words."""
    fates = {crop["error"]: Status(crop["status"]) for crop in own if crop["nature"] != "place"}
    if not fates:
        return RowError(Status.BAD_ROW, "no crops")
    reason = main_reason([crop["error"] for crop in own if crop["nature"] != "place"])
    return RowError(fates[reason], reason)


def thinned(shown: Sequence[list[Row]], most: int) -> list[list[Row]]:
    """At most `most` crops in all: the last one of the subject that has most of them goes first."""
    kept = [list(crops) for crops in shown]
    while sum(map(len, kept)) > most:
        max(reversed(kept), key=len).pop()
    return kept


def _references(choice: Choice, target: Row, own: list[Row]) -> list[Row]:
    """The crops that may stand for `target`, best first."""
    if choice.pairs != "in_pair":
        compared = cross_references(target, choice.crops, choice.similarity, at_most=choice.references)
        choice.tally.add(compared)
        found = [pair.reference for pair in compared if pair.fate == "used"]
        if found or choice.pairs == "cross_clip":
            return found
    others = [crop for crop in own if crop["start"] == target["start"] and crop["status"] == Status.OK]
    return [target, *(crop for crop in others if crop["crop_id"] != target["crop_id"])]


def video_prediction(draw: Draw) -> Made:
    """The caption and the target's first frame."""
    if draw.row["media"] == Media.IMAGE:
        raise RowError(Status.FILTERED_NOT_VIDEO, "a picture has no next frame")
    first = first_frame(draw.row, local_uri=draw.local_uri)
    data = encode(fit_inside(Image.fromarray(first.frames[0]), first_frame_px(draw.row)))
    segments = [text(draw.caption, Role.CAPTION), image(data, Role.FIRST_FRAME)]
    return segments, _frame_flags(first.from_target)


def first_frame_px(row: Row) -> int:
    """Longest side of a first frame: no coarser than the target's own, which training shows."""
    target = row["target"] or {}
    if target.get("kind") != TargetKind.REFERENCE or target.get("width_px"):
        return max(SIDE_PX, target.get("height_px") or 0, target.get("width_px") or 0)
    return min(max(SIDE_PX, row["height_px"] or 0, row["width_px"] or 0), MAX_FIRST_PX)


def text_to_video(draw: Draw) -> Made:
    """All retrieved documents, best first: how many are used is drawn when training loads the row."""
    retrieved = [s for s in draw.row["segments"] or [] if s["role"] == Role.RETRIEVED]
    if not retrieved:
        raise RowError(Status.FILTERED_NO_DOCUMENT, "no retrieved document")
    return [*retrieved, text(draw.caption, Role.CAPTION)], draw.row["flags"] or []


RECIPES: dict[str, Recipe] = {
    Task.SUBJECT_DRIVEN: Recipe(TASKS[Task.SUBJECT_DRIVEN].instruction, subject_driven),
    Task.VIDEO_PREDICTION: Recipe(TASKS[Task.VIDEO_PREDICTION].instruction, video_prediction),
    Task.TEXT_TO_VIDEO: Recipe(TASKS[Task.TEXT_TO_VIDEO].instruction, text_to_video),
}
"""Every task that `vimi-data instruct` can make, by name."""


def replace_words(caption: str, pictures: Sequence[Picture]) -> list[Segment]:
    """The caption with words replaced by pictures; the pictures' entities don't overlap.

    Further pictures of one entity follow its first and carry no word: without its pictures it is said once.
    """
    segments = []
    place = 0
    for picture in sorted(pictures, key=lambda p: p.entity.start):
        entity = picture.entity
        if entity.end <= place:
            segments.append(image(picture.image, picture.role))
            continue
        if entity.start > place:
            segments.append(text(caption[place : entity.start], Role.CAPTION))
        segments.append(image(picture.image, picture.role, entity.text))
        place = entity.end
    if place < len(caption):
        segments.append(text(caption[place:], Role.CAPTION))
    return segments


def text(words: str, role: Role) -> Segment:
    return {"type": "text", "role": role.value, "text": words, "image": None, "document": None}


def image(data: bytes, role: Role, words: str | None = None) -> Segment:
    return {"type": "image", "role": role.value, "text": words, "image": data, "document": None}


def draw_tasks(
    tasks: Sequence[str], proportions: Mapping[str, float] | None, *, seed: int, clip_id: str
) -> list[str]:
    """The tasks that a clip is drawn for: all, or one of them by its weight (1 where none is given)."""
    if proportions is None:
        return list(tasks)
    steps = np.cumsum([proportions.get(task, 1.0) for task in tasks])
    place = generator(seed, clip_id, "task").random() * steps[-1]
    return [tasks[int(np.searchsorted(steps, place, side="right"))]]


def generator(seed: int, clip_id: str, stream: str) -> np.random.Generator:
    """Randomness of one clip: the same on every machine, whatever else the job holds."""
    digest = hashlib.sha256(f"{seed}/{clip_id}/{stream}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _frame_flags(from_target: bool) -> list[str]:
    return ["frames_from_target"] if from_target else []
