"""The three instructions of VIMI's second stage, as segments: pure, one row in, one prompt out.

    subject-driven    Generate a video with the text and image.        A [dog] is playing in [grass].
    video prediction  Generate a video with the text and first frame.  caption [first frame]
    text-to-video     Generate a video with the retrieved text-image.  retrieved text [picture] caption

The instruction lines are those of the paper's second figure; two of them end in an ellipsis there, and
what it hides is not published. Words are replaced by pictures in place: the text segments and the words
behind the pictures, joined, are the caption.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.prompts.subjects.cutout import Picture
from pipeline.schema import Role, Task

INSTRUCTIONS = {
    Task.SUBJECT_DRIVEN: "Generate a video with the text and image.",
    Task.VIDEO_PREDICTION: "Generate a video with the text and first frame.",
    Task.TEXT_TO_VIDEO: "Generate a video with the retrieved text-image.",
}
Segment = dict[str, Any]


def text(words: str, role: Role) -> Segment:
    return {"type": "text", "role": role.value, "text": words, "image": None, "document": None}


def image(data: bytes, role: Role, words: str | None = None) -> Segment:
    return {"type": "image", "role": role.value, "text": words, "image": data, "document": None}


def instruction(task: Task) -> Segment:
    return text(INSTRUCTIONS[task], Role.INSTRUCTION)


def subject_driven(caption: str, pictures: Sequence[Picture]) -> list[Segment]:
    """The caption with words replaced by pictures; the pictures' entities don't overlap."""
    segments = [instruction(Task.SUBJECT_DRIVEN)]
    place = 0
    for picture in sorted(pictures, key=lambda p: p.entity.start):
        entity = picture.entity
        if entity.start > place:
            segments.append(text(caption[place : entity.start], Role.CAPTION))
        segments.append(image(picture.image, picture.role, entity.text))
        place = entity.end
    if place < len(caption):
        segments.append(text(caption[place:], Role.CAPTION))
    return segments


def video_prediction(caption: str, first_frame: bytes) -> list[Segment]:
    return [
        instruction(Task.VIDEO_PREDICTION),
        text(caption, Role.CAPTION),
        image(first_frame, Role.FIRST_FRAME),
    ]


def text_to_video(caption: str, retrieved: Sequence[Segment]) -> list[Segment]:
    """All retrieved documents, best first: how many are used is drawn when training loads the row."""
    return [instruction(Task.TEXT_TO_VIDEO), *retrieved, text(caption, Role.CAPTION)]
