"""What samples.json keeps of a prompt's own segments: words in order, pictures as files beside the video."""

from typing import Any

from model.condition import Prompt
from model.data.batch import Role
from model.sampling.documents import ending_of


def keep_segments(name: str, prompt: Prompt) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The segments as plain values, but for the documents, which `describe_documents` tells of.

    Args:
        name: of the video's files, without ending; those of the pictures begin with it.
        prompt: its segments.

    Returns:
        For each segment its type, role, text and the name of its picture's file; and the files.
    """
    segments, files = [], {}
    for segment in prompt:
        if segment.role == Role.RETRIEVED:
            continue
        file = None
        if segment.image is not None:
            file = f"{name}-{segment.role}-{len(files) + 1}.{ending_of(segment.image)}"
            files[file] = segment.image
        segments.append({"type": segment.type, "role": segment.role, "text": segment.text, "picture": file})
    return segments, files
