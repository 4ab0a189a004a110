"""One row of a protocol, and how it becomes a row of PROMPTS."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.prompts.tasks import text
from pipeline.schema import PROMPTS, TASKS, Media, Role, TargetKind, Task, content_id, prompt_id

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One video that a protocol asks for.

    Attributes:
        key: unique in the protocol.
        caption: the prompt's words.
        video: path of the real video, if it has one.
        segments: of the prompt; () = the caption alone.
        task: that the prompt asks for.
        split: of the corpus.
        start_s, end_s: the real clip in its file; 0 and None = all of it.
        row: a row of PROMPTS that is taken as it is.
    """

    key: str
    caption: str
    video: str | None = None
    segments: tuple[dict[str, Any], ...] = ()
    task: Task = Task.PRETRAIN
    split: str = "test"
    start_s: float = 0.0
    end_s: float | None = None
    row: Row | None = None


@dataclass(frozen=True)
class Exam:
    """What a protocol came to.

    Attributes:
        items: in order.
        listed: rows of the exclusion list: source_uri, source_sha256, url, sha256, clip_id.
        facts: what the certificate tells of it.
    """

    items: list[Item]
    listed: list[dict[str, str]]
    facts: dict[str, Any] = field(default_factory=dict)


def as_row(item: Item, protocol: str, config_hash: str, documents: Row | None, *, instruct: bool) -> Row:
    """The row of PROMPTS.

    Args:
        item: of the protocol.
        protocol: its name.
        config_hash: of the job.
        documents: what was retrieved for the caption: a row of PROMPTS; None = nothing.
        instruct: put the task's instruction line in front, as stage 2 has learned it.
    """
    if item.row is not None:
        return item.row
    own = list(item.segments) or [text(item.caption, Role.CAPTION)]
    found = [s for s in (documents or {}).get("segments", ()) if s["role"] == Role.RETRIEVED]
    task = Task.TEXT_TO_VIDEO if instruct and found and item.task == Task.PRETRAIN else item.task
    line = [text(TASKS[task].instruction, Role.INSTRUCTION)] if task in TASKS else []
    clip = content_id("benchmark", protocol, item.key)
    return dict.fromkeys(PROMPTS.names) | {
        "prompt_id": prompt_id(task, clip, config_hash),
        "task": task.value,
        "clip_id": clip,
        "media": Media.VIDEO.value,
        "caption": item.caption,
        "segments": [*line, *found, *own],
        "num_documents": (documents or {}).get("num_documents", 0),
        "flags": [],
        "target": {"kind": TargetKind.REFERENCE.value} if item.video else None,
        "source_uri": item.video,
        "start_s": item.start_s,
        "end_s": item.end_s,
        "source_name": protocol,
        "split": item.split,
        "memory_version": (documents or {}).get("memory_version"),
        "model_hash": (documents or {}).get("model_hash"),
        "config_hash": config_hash,
    }
