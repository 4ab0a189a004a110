"""The galleries of the second stage: instructions as the encoder reads them, and sampled videos."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.storage import absolute, exists, join, read_bytes, read_json
from pipeline.report.album import Album
from pipeline.report.galleries import Card, target_card
from pipeline.report.read import spread
from pipeline.schema import Role, Task
from pipeline.shards import ShardSet

TASK_TITLES = {
    Task.SUBJECT_DRIVEN: "Subject-driven generation",
    Task.VIDEO_PREDICTION: "Video prediction",
    Task.TEXT_TO_VIDEO: "Text-to-video generation",
}


def instruction_cards(shards: ShardSet | None, album: Album, count: int) -> list[Card]:
    """Stage-2 instructions by task, each as its line of words and pictures."""
    if shards is None or not count:
        return []
    by_task: dict[str, list[tuple[int, int]]] = {}
    for group in range(len(shards)):
        for place, task in enumerate(shards.read_row_group(group, ["task"])["task"].to_pylist()):
            by_task.setdefault(task, []).append((group, place))
    sections = []
    for task in (task for task in TASK_TITLES if task in by_task):
        places = by_task[task]
        shift = len(sections) * len(places) // (3 * count)  # each task shows other clips
        chosen = [places[(i + shift) % len(places)] for i in spread(len(places), count)]
        rows = [shards.read_row_group(group).slice(place, 1).to_pylist()[0] for group, place in chosen]
        cards = [_instruction_card(row, album) for row in rows]
        sections.append({"task": task.value, "title": TASK_TITLES[task], "total": len(places), "cards": cards})
    return sections


def _instruction_card(row: dict[str, Any], album: Album) -> Card:
    instruction, line = prompt_line(row["segments"] or [], album)
    target = target_card(row, album)
    return {"instruction": instruction, "line": line, "target": target, "caption": row["caption"]}


def prompt_line(segments: list[Card], album: Album) -> tuple[str, list[Card]]:
    """The instruction's own sentence, and the rest as pieces: words, pictures, how many are not shown."""
    line: list[Card] = []
    instruction = ""
    for segment in _first_document(segments):
        if "more" in segment:
            line.append(segment)
        elif segment["role"] == Role.INSTRUCTION:
            instruction = segment["text"]
        elif segment["type"] == "text":
            line.append({"text": segment["text"], "role": segment["role"]})
        else:
            picture = album.picture(segment["image"], side_px=224)
            line.append({"picture": picture, "word": segment["text"], "role": segment["role"]})
    return instruction, line


def _first_document(segments: list[Card]) -> Iterator[Card]:
    """The segments, of the retrieved documents only the best, and how many more there are."""
    retrieved = [s for s in segments if s["role"] == Role.RETRIEVED]
    best = [s for s in retrieved if (s["document"] or {}).get("rank", 1) in (1, None)]
    more = sum(s["type"] == "image" for s in retrieved) - sum(s["type"] == "image" for s in best)
    for segment in segments:
        if segment["role"] != Role.RETRIEVED or segment in best:
            yield segment
        if best and segment is best[-1] and more > 0:
            yield {"more": more}


def sample_cards(
    folder: str, shards: Sequence[ShardSet], album: Album, count: int, *, label: str | None = None
) -> list[Card]:
    """Sampled videos with their prompts; a video too large for the page is shown by its contact sheet.

    Args:
        folder: output of `vimi-train sample`.
        shards: where prompts that were taken from shards can be found again, pictures and all.
        album: the budget.
        count: videos shown.
        label: where they come from; None = the folder's name.
    """
    uri = absolute(folder)
    label = label or uri.rpartition("/")[2]
    entries = read_json(join(uri, "samples.json"))
    entries = entries.get("samples", []) if isinstance(entries, dict) else entries
    return [_sample_card(uri, entry, n, shards, album, label) for n, entry in enumerate(entries[:count])]


def _sample_card(
    uri: str, entry: Card, number: int, shards: Sequence[ShardSet], album: Album, label: str
) -> Card:
    video = _file(uri, entry.get("video") or f"sample-{number:03d}.mp4")
    sheet = _file(uri, entry.get("sheet") or f"sample-{number:03d}.png")
    segments = find_segments(shards, entry.get("prompt_id"))
    instruction, line = prompt_line(segments, album) if segments else ("", [])
    facts = [f"{name} {entry[key]}" for key, name in FACTS.items() if entry.get(key) is not None]
    return {
        "prompt": str(entry.get("prompt") or ""),
        "instruction": instruction,
        "line": line,
        "task": entry.get("task"),
        "video": album.add(video, "video/mp4") if video else None,
        "sheet": album.picture(sheet, side_px=1280),
        "facts": " · ".join([label, *facts]),
    }


FACTS = {"seed": "seed", "num_steps": "steps", "guidance": "guidance"}


def _file(uri: str, name: Any) -> bytes | None:
    """A file of the folder; names come from a file, so only their last part counts."""
    place = join(uri, str(name).rpartition("/")[2] or "-")
    return read_bytes(place) if exists(place) else None


def find_segments(shards: Sequence[ShardSet], prompt_id: str | None) -> list[Card]:
    """The segments of a prompt by its id; [] when it is in none of the shards."""
    if not prompt_id:
        return []
    for shard_set in shards:
        for group in range(len(shard_set)):
            ids = shard_set.read_row_group(group, ["prompt_id"])["prompt_id"]
            place = pc.index(ids, pa.scalar(prompt_id)).as_py()
            if place >= 0:
                return shard_set.read_row_group(group, ["segments"])["segments"][place].as_py()
    return []
