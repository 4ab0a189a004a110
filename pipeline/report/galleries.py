"""The galleries: clips as filmstrips, prompts and instructions as they reach the encoder, sampled videos."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from infra.storage import absolute, exists, join, read_bytes, read_json
from pipeline.report.album import Album
from pipeline.report.read import read_columns, spread
from pipeline.schema import Media, Role, Status, TargetKind, Task
from pipeline.shards import ShardSet
from pipeline.subjects.frames import read_frames, target_frames
from pipeline.video import VideoError, clip_times, decode_frames, probe

STRIP_FRAMES, TARGET_FRAMES = 5, 16
TASK_TITLES = {
    Task.SUBJECT_DRIVEN: "Subject-driven generation",
    Task.VIDEO_PREDICTION: "Video prediction",
    Task.TEXT_TO_VIDEO: "Text-to-video generation",
}
CLIP_COLUMNS = ["clip_id", "media", "caption", "source_uri", "local_uri", "start_s", "end_s"]
CLIP_COLUMNS += ["width_px", "height_px", "fps", "status"]
Card = dict[str, Any]


def clip_cards(folder: str | None, album: Album, count: int) -> list[Card]:
    """Good clips, evenly from the table, as filmstrips."""
    if folder is None or not count:
        return []
    table = read_columns(absolute(folder), CLIP_COLUMNS, max_rows=200_000)
    good = [i for i, status in enumerate(table["status"].to_pylist()) if status == Status.OK]
    rows = [table.slice(good[i], 1).to_pylist()[0] for i in spread(len(good), count)]
    return [_clip_card(row, album) for row in rows]


def _clip_card(row: dict[str, Any], album: Album) -> Card:
    start_s, end_s = row["start_s"] or 0.0, row["end_s"] or 0.0
    is_image = row["media"] == Media.IMAGE
    facts = [f"{row['width_px']}×{row['height_px']}"] if row["width_px"] else []
    facts += ["picture"] if is_image else [f"{end_s - start_s:.1f} s"]
    facts += [f"{row['fps']:.4g} fps"] if row["fps"] else []
    try:
        times_s = (0.5,) if is_image else tuple(clip_times(0, 1, STRIP_FRAMES))
        frames = read_frames({**row, "target": None}, times_s, local_uri=row["local_uri"]).frames
        strip = album.filmstrip(frames, height_px=96)
    except VideoError as error:
        strip, facts = None, [*facts, f"can't be read now: {error}"]
    return {"caption": row["caption"], "facts": " · ".join(facts), "strip": strip, "source": _name(row)}


def _name(row: dict[str, Any]) -> str:
    return str(row["source_uri"] or "").rpartition("/")[2]


def prompt_cards(shards: ShardSet | None, album: Album, count: int) -> list[Card]:
    """Stage-1 prompts: caption, retrieved documents by rank, target."""
    if shards is None:
        return []
    return [_prompt_card(row, album) for row in _rows(shards, count)]


def _rows(shards: ShardSet, count: int) -> Iterator[dict[str, Any]]:
    for number in spread(shards.num_rows, count):
        group, place = shards.find(number)
        yield shards.read_row_group(group).slice(place, 1).to_pylist()[0]


def _prompt_card(row: dict[str, Any], album: Album) -> Card:
    documents: dict[tuple[int, str], Card] = {}
    for segment in row["segments"] or []:
        if segment["role"] != Role.RETRIEVED or not segment["document"]:
            continue
        origin = segment["document"]
        key = (origin["rank"] or 0, origin["doc_id"] or "")
        card = documents.setdefault(key, {"text": None, "picture": None, **_origin(origin)})
        if segment["type"] == "text":
            card["text"] = segment["text"]
        else:
            card["picture"] = album.picture(segment["image"], side_px=224)
    return {
        "caption": row["caption"],
        "documents": [documents[key] for key in sorted(documents)],
        "target": _target(row, album),
        "flags": row["flags"] or [],
        "source": _name(row),
    }


def _origin(document: dict[str, Any]) -> Card:
    facts = [str(document["retriever"] or "")]
    if document["score"] is not None:
        facts[0] += f" {document['score']:.3g}"
    if document["clip_similarity"] is not None:
        facts.append(f"CLIP {round(document['clip_similarity'], 2) + 0.0:.2f}")
    return {"rank": document["rank"], "facts": facts}


def _target(row: dict[str, Any], album: Album) -> Card:
    """The target as a moving picture, with its size."""
    target = row["target"] or {}
    try:
        frames, fps = _target_frames(row, target)
    except (VideoError, ValueError) as error:
        return {"moving": None, "still": None, "facts": f"can't be read now: {error}"}
    facts = f"{len(frames)} frames of {frames[0].shape[1]}×{frames[0].shape[0]}"
    facts += f" at {fps:.3g} fps" if math.isfinite(fps) else ", a picture"
    return {**album.moving(frames, fps=fps, side_px=192), "facts": facts}


def _target_frames(row: dict[str, Any], target: dict[str, Any]) -> tuple[np.ndarray, float]:
    fps = target.get("fps") or row["fps"] or 8.0
    if target.get("kind") == TargetKind.FRAMES and target.get("data"):
        frames = target_frames(target)
        return (frames[:1] if not math.isfinite(fps) else frames), fps
    if target.get("data"):
        duration_s = probe(target["data"]).duration_s
        times_s = clip_times(0, duration_s, TARGET_FRAMES)
        return decode_frames(target["data"], times_s), TARGET_FRAMES / max(duration_s, 0.1)
    if row["media"] == Media.IMAGE:
        return read_frames(row, (0.0,)).frames, math.inf
    duration_s = max((row["end_s"] or 0) - (row["start_s"] or 0), 0.1)
    fracs = tuple(clip_times(0, 1, TARGET_FRAMES))
    return read_frames(row, fracs).frames, TARGET_FRAMES / duration_s


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
    line: list[Card] = []
    instruction = ""
    for segment in _first_document(row["segments"] or []):
        if "more" in segment:
            line.append(segment)
        elif segment["role"] == Role.INSTRUCTION:
            instruction = segment["text"]
        elif segment["type"] == "text":
            line.append({"text": segment["text"], "role": segment["role"]})
        else:
            picture = album.picture(segment["image"], side_px=224)
            line.append({"picture": picture, "word": segment["text"], "role": segment["role"]})
    target = _target(row, album)
    return {"instruction": instruction, "line": line, "target": target, "caption": row["caption"]}


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


def sample_cards(folder: str, album: Album, count: int) -> list[Card]:
    """Sampled videos with their prompts; a video too large for the page is shown by its contact sheet."""
    uri = absolute(folder)
    entries = read_json(join(uri, "samples.json"))
    entries = entries.get("samples", []) if isinstance(entries, dict) else entries
    return [_sample_card(uri, entry, number, album) for number, entry in enumerate(entries[:count])]


def _sample_card(uri: str, entry: dict[str, Any], number: int, album: Album) -> Card:
    names = [name for name in _strings(entry) if name.endswith((".mp4", ".png", ".webp", ".gif"))]
    names += [f"sample-{number:03d}.mp4", f"sample-{number:03d}.png"]
    found = {name.rpartition(".")[2]: name.rpartition("/")[2] for name in reversed(names)}
    video = sheet = None
    if "mp4" in found and exists(join(uri, found["mp4"])):
        video = album.add(read_bytes(join(uri, found["mp4"])), "video/mp4")
    if "png" in found and exists(join(uri, found["png"])):
        sheet = album.picture(read_bytes(join(uri, found["png"])), side_px=1280)
    facts = [f"{k} {entry[k]}" for k in ("seed", "steps", "num_steps", "guidance") if _plain(entry.get(k))]
    return {
        "prompt": entry.get("caption") or entry.get("prompt") or entry.get("text") or "",
        "task": entry.get("task"),
        "video": video,
        "sheet": sheet,
        "facts": " · ".join([uri.rpartition("/")[2], *facts]),
    }


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)
