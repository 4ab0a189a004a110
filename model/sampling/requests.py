"""Reads sample requests from the command line, a JSONL file, or rows of prompt shards.

"A <image> is playing in a <image>" + [dog.png, background:yard.jpg]
"<image> A blick moves left." + ["retrieved:a blick=blick.png"]    a document by hand: its text, its picture
{"prompt": "A <image> runs.", "images": ["dog.png"]}
{"segments": [{"type": "text", "role": "caption", "text": "A dog runs."}]}
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from infra.errors import ConfigError
from infra.storage import absolute, exists, read_bytes
from model.condition import Prompt, Segment
from model.data.batch import ROLES, TASKS, Role, noise_key, read_prompt
from model.data.shards import open_parquet, open_shards
from model.prompt.select import documents

PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class SampleRequest:
    """One video to make.

    Attributes:
        prompt: its segments.
        fps: frame rate to condition on and to write.
        original_size_px: (height, width) to condition on.
        seed: of the noise (see `noise_index`).
        task, prompt_id, clip_id: of the shard's row, if it is one.
        origins: where its documents come from, best first: doc_id, rank, score, retriever, memory_version.
        documents_of: the prompt whose documents these are, if they are not its own.
    """

    prompt: Prompt
    fps: float
    original_size_px: tuple[int, int]
    seed: int = 0
    task: str | None = None
    prompt_id: str | None = None
    clip_id: str | None = None
    origins: tuple[dict[str, Any], ...] = ()
    documents_of: str | None = None

    @property
    def noise_index(self) -> int:
        """Which of the seed's noises it starts from: rows of shards each from another, since numbers that are
        averaged over them must not hang on one draw; prompts in words from the same, so that a seed can be
        compared between wordings.
        """
        return noise_key(self.task, self.clip_id) if self.task and self.clip_id else 0


def parse_prompt(text: str, images: Sequence[str], *, instruct: bool = False) -> Prompt:
    """Segments of a prompt with placeholders and the pictures that fill them, in order.

    `images` are paths, one a placeholder, each optionally `role:path` (`split_place`); `instruct` puts the
    task's instruction line in front, as stage 2 has learned it.

    Raises:
        ConfigError: another number of pictures than placeholders, or a picture that isn't there.
    """
    words = text.split(PLACEHOLDER)
    if len(words) - 1 != len(images):
        raise ConfigError(
            f"{len(words) - 1} {PLACEHOLDER} in {text!r} and {len(images)} images",
            legal="one image for each placeholder, in order",
        )
    segments: list[Segment] = []
    for number, word in enumerate(words):
        if word.strip():
            segments.append(Segment("text", Role.CAPTION.value, word.strip()))
        if number < len(images):
            segments += read_image(images[number])
    return instructed(tuple(segments)) if instruct else tuple(segments)


def instructed(prompt: Prompt) -> Prompt:
    """The prompt behind the instruction line of the task that its pictures ask for, where that is missing."""
    roles = {segment.role for segment in prompt}
    line = next((task.instruction for task in TASKS.values() if task.role in roles), None)
    if line is None or Role.INSTRUCTION in roles:
        return prompt
    return (Segment("text", Role.INSTRUCTION.value, line), *prompt)


def picture_roles() -> list[str]:
    """Roles that a user's picture may have."""
    return [str(role) for role, facts in ROLES.items() if facts.kind != "text"]


def read_image(place: str) -> list[Segment]:
    """The picture at `path` or `role:path`; for `retrieved:text=path` a document, text before picture."""
    role, text, path = split_place(place)
    try:
        picture = Segment("image", role, None, read_bytes(absolute(path)))
    except OSError as error:
        raise ConfigError(
            f"can't read image {path}: {error.strerror or error}",
            legal=f"a picture's path, or one of {', '.join(f'{r}:' for r in picture_roles())} before it",
        ) from None
    return [Segment("text", role, text), picture] if text else [picture]


def split_place(place: str) -> tuple[str, str, str]:
    """(role, text, path) of `path`, `role:path` or `retrieved:text=path`; the role is `subject` if not said."""
    role, sep, path = place.partition(":")
    if not sep or role not in picture_roles():
        return Role.SUBJECT.value, "", place
    if role != Role.RETRIEVED or "=" not in path:
        return role, "", path
    text, _, path = path.partition("=")
    return role, text.strip(), path


def describe_prompt(prompt: Prompt) -> str:
    """The prompt in words, pictures as <role>."""
    parts = [s.text or "" if s.type == "text" else f"<{s.role}>" for s in prompt if s.role != Role.RETRIEVED]
    return " ".join(part for part in parts if part)


def caption_of(prompt: Prompt) -> str:
    """Its own words: what its documents are retrieved by."""
    texts = [(segment.text or "").strip() for segment in prompt if segment.role == Role.CAPTION]
    return " ".join(text for text in texts if text)


def prompts_in_file(path: str, *, instruct: bool = False) -> list[Prompt]:
    """Prompts of a JSONL file; relative picture paths are looked up beside it.

    Raises:
        ConfigError: no such file, or a line that is not a prompt; names the line.
    """
    if not exists(absolute(path)):
        raise ConfigError(f"no prompts file {path}", cure="give the path of a JSONL file")
    beside = Path(absolute(path)).parent
    prompts = []
    for number, line in enumerate(read_bytes(absolute(path)).decode("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_from_line(json.loads(line), beside, instruct))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{path} line {number}: {error}",
                legal='{"prompt": ..., "images": [...]} or {"segments": [...]}',
            ) from None
    return prompts


def _from_line(value: dict[str, Any], beside: Path, instruct: bool) -> Prompt:
    if "segments" not in value:
        images = [_beside(image, beside) for image in value.get("images", [])]
        return parse_prompt(value["prompt"], images, instruct=instruct)
    segments = []
    for item in value["segments"]:
        role = item.get("role", Role.CAPTION.value)
        if role not in ROLES:
            raise ValueError(f"role {role!r}, legal: {', '.join(ROLES)}")
        image = read_image(_beside(item["image"], beside))[-1].image if item.get("image") else None
        segments.append(Segment("image" if image else "text", role, item.get("text"), image))
    return tuple(segments)


def _beside(place: str, folder: Path) -> str:
    """The place of a picture with a relative path looked up in `folder`."""
    path = split_place(place)[2]
    prefix = place.removesuffix(path)
    return prefix + (path if Path(path).is_absolute() or "://" in path else str(folder / path))


ROW_COLUMNS = [
    *("prompt_id", "clip_id", "task", "split", "segments", "target", "fps", "height_px", "width_px"),
    "memory_version",
]
ORIGIN = ("doc_id", "rank", "score", "retriever", "clip_similarity")
"""What is told of where a document comes from, beside the memory's version."""


def requests_in_shards(
    uri: str, rows: int, *, fps: float, original_size_px: tuple[int, int], split: str | None = None
) -> list[SampleRequest]:
    """The first `rows` prompts of a certified folder, tasks in turn, so that each task is seen.

    `fps` and `original_size_px` are for rows that don't bring their own, as pictures do; `split` None = all.

    Raises:
        ConfigError: no row of that split; names those that are there.
    """
    shards = open_shards(uri)
    num_tasks = (
        1 if shards.certificate.job == "augment" else len(shards.certificate.facts.get("tasks") or TASKS)
    )
    by_task: dict[str, list[SampleRequest]] = {}
    splits: set[str] = set()
    for group in shards.groups:
        table = open_parquet(group.uri).read_row_group(group.index, columns=ROW_COLUMNS)
        names = table["split"].to_pylist()
        splits.update(map(str, names))
        if split is not None:
            table = table.filter(pa.array([name == split for name in names], pa.bool_()))
        for row in table.to_pylist():
            found = by_task.setdefault(row["task"], [])
            if len(found) < rows:
                found.append(_request(row, fps, original_size_px))
        if len(by_task) == num_tasks and all(len(found) == rows for found in by_task.values()):
            break
    if not by_task:
        raise ConfigError(f"no prompt of split {split!r} in {uri}", legal=", ".join(sorted(splits)))
    turns = [list(found) for _, found in sorted(by_task.items())]
    chosen: list[SampleRequest] = []
    while len(chosen) < rows and any(turns):
        chosen += [found.pop(0) for found in turns if found]
    return chosen[:rows]


def _request(row: dict[str, Any], fps: float, original_size_px: tuple[int, int]) -> SampleRequest:
    """One row of PROMPTS as a request."""
    own = (row["target"] or {}).get("fps") or row["fps"]
    prompt = read_prompt(row)
    return SampleRequest(
        prompt=prompt,
        fps=own if own and math.isfinite(own) else fps,
        original_size_px=(row["height_px"], row["width_px"]) if row["height_px"] else original_size_px,
        task=row["task"],
        prompt_id=row["prompt_id"],
        clip_id=row["clip_id"],
        origins=origins_in(row["segments"], prompt, row["memory_version"]),
    )


def origins_in(
    segments: Sequence[dict[str, Any]], prompt: Prompt, memory_version: str | None
) -> tuple[dict[str, Any], ...]:
    """Where each document of a stored prompt comes from, best first."""
    stored = [segments[places[0]].get("document") or {} for places in documents(prompt)]
    return tuple(
        {**{name: one.get(name) for name in ORIGIN}, "memory_version": memory_version} for one in stored
    )


def prompt_hash(prompt: Prompt) -> str:
    digest = hashlib.sha256()
    for s in prompt:
        digest.update(repr((s.type, s.role, s.text, s.image)).encode())
    return digest.hexdigest()[:16]
