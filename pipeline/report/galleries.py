"""Galleries of the page: clips as filmstrips, prompts, instructions as the encoder reads them, videos."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.certificate import check_certified
from infra.samples import read_samples
from infra.storage import absolute, exists, join, read_bytes
from pipeline.media.clip import read_frames, target_frames
from pipeline.media.frames import clip_times, decode_frames, probe
from pipeline.report.album import Album
from pipeline.report.read import read_columns, spread
from pipeline.schema import TASKS, Media, Role, RowError, Status, TargetKind
from pipeline.shards import ShardSet

NUM_CLIPS, NUM_PROMPTS, NUM_INSTRUCTIONS, NUM_SAMPLES = 12, 8, 4, 12
"""Shown on the page: clips, prompts, instructions of each task, videos of each folder. Ours."""
STRIP_FRAMES, TARGET_FRAMES = 5, 16
CLIP_COLUMNS = ["clip_id", "media", "caption", "source_uri", "source_sha256", "local_uri", "start_s", "end_s"]
CLIP_COLUMNS += ["width_px", "height_px", "fps", "status"]
SAMPLE_FACTS = {"documents": "documents", "seed": "seed", "num_steps": "steps", "guidance": "guidance"}
Card = dict[str, Any]


def clip_cards(folder: str | None, album: Album) -> list[Card]:
    """Good clips, evenly from the table, as filmstrips."""
    if folder is None:
        return []
    table = read_columns(absolute(folder), CLIP_COLUMNS)
    good = [i for i, status in enumerate(table["status"].to_pylist()) if status == Status.OK]
    rows = [table.slice(good[i], 1).to_pylist()[0] for i in spread(len(good), NUM_CLIPS)]
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
    except RowError as error:
        strip, facts = None, [*facts, f"can't be read now: {error}"]
    return {
        "caption": row["caption"],
        "facts": " · ".join([*facts, _name(row)]),
        "strip": strip,
        "is_image": is_image,
    }


def _name(row: dict[str, Any]) -> str:
    return str(row["source_uri"] or "").rpartition("/")[2]


def prompt_cards(shards: ShardSet | None, album: Album) -> list[Card]:
    """Stage-1 prompts: caption, retrieved documents by rank, target."""
    if shards is None:
        return []
    return [_prompt_card(_row(shards, number), album) for number in prompt_numbers(shards)]


def prompt_numbers(shards: ShardSet) -> list[int]:
    """Rows to show, evenly over the table; of those without documents a quarter, where others have some."""
    looked_at = spread(shards.num_rows, 8 * NUM_PROMPTS)
    bare = [n for n in looked_at if not _row(shards, n, ["num_documents"])["num_documents"]]
    rich = sorted(set(looked_at) - set(bare))
    few = min(len(bare), max(NUM_PROMPTS // 4, NUM_PROMPTS - len(rich)))
    chosen = [(rich, NUM_PROMPTS - few), (bare, few)]
    return sorted(some[i] for some, count in chosen for i in spread(len(some), count))


def _row(shards: ShardSet, number: int, columns: list[str] | None = None) -> dict[str, Any]:
    group, place = shards.find(number)
    return shards.read_row_group(group, columns).slice(place, 1).to_pylist()[0]


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
        "target": target_card(row, album),
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


def target_card(row: dict[str, Any], album: Album) -> Card:
    """The target as a moving picture, with its size."""
    target = row["target"] or {}
    try:
        frames, fps = _target_frames(row, target)
    except (RowError, ValueError) as error:
        return {"moving": None, "still": None, "facts": f"can't be read now: {error}"}
    size = f"{frames[0].shape[1]}×{frames[0].shape[0]}"
    is_picture = len(frames) == 1 or not math.isfinite(fps)
    facts = f"a picture of {size}" if is_picture else f"{len(frames)} frames of {size} at {fps:.3g} fps"
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


def instruction_cards(shards: ShardSet | None, album: Album) -> list[Card]:
    """Stage-2 instructions by task, each as its line of words and pictures."""
    if shards is None:
        return []
    by_task: dict[str, list[tuple[int, int]]] = {}
    for group in range(len(shards)):
        for place, task in enumerate(shards.read_row_group(group, ["task"])["task"].to_pylist()):
            by_task.setdefault(task, []).append((group, place))
    sections = []
    for task in [*(task for task in TASKS if task in by_task), *sorted(by_task.keys() - TASKS.keys())]:
        places = by_task[task]
        shift = len(sections) * len(places) // (len(by_task) * NUM_INSTRUCTIONS)  # each task shows other clips
        chosen = [places[(i + shift) % len(places)] for i in spread(len(places), NUM_INSTRUCTIONS)]
        rows = [shards.read_row_group(group).slice(place, 1).to_pylist()[0] for group, place in chosen]
        cards = [_instruction_card(row, album) for row in rows]
        sections.append({"task": str(task), "total": len(places), "cards": cards})
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
    folder: str, shards: Sequence[ShardSet], album: Album, *, label: str | None = None
) -> list[Card]:
    """Sampled videos with their prompts; a video too large for the page is shown by its contact sheet.

    Prompts that were taken from `shards` are found again there, with what is known of their documents; of
    others the folder keeps the pictures itself. `label` None = the folder's name.
    """
    uri = absolute(folder)
    label = label or uri.rpartition("/")[2]
    entries = read_samples(uri)[:NUM_SAMPLES]
    return [_sample_card(uri, entry, n, shards, album, label) for n, entry in enumerate(entries)]


def _sample_card(
    uri: str, entry: Card, number: int, shards: Sequence[ShardSet], album: Album, label: str
) -> Card:
    video = _file(uri, entry.get("video") or f"sample-{number:03d}.mp4")
    sheet = _file(uri, entry.get("sheet") or f"sample-{number:03d}.png")
    stored = find_segments(shards, entry.get("prompt_id")) or own_segments(uri, entry)
    segments = _as_sampled(uri, entry, stored)
    instruction, line = prompt_line(segments, album) if segments else ("", [])
    facts = [f"{name} {entry[key]}" for key, name in SAMPLE_FACTS.items() if entry.get(key) is not None]
    return {
        "prompt": str(entry.get("prompt") or ""),
        "instruction": instruction,
        "line": line,
        "task": entry.get("task"),
        "video": album.add(video, "video/mp4") if video else None,
        "sheet": album.picture(sheet, side_px=1280),
        "facts": " · ".join([label, *facts]),
    }


def _as_sampled(uri: str, entry: Card, stored: list[Card]) -> list[Card]:
    """The prompt's segments with the documents that the video was made with: found for it, none, or others'."""
    if entry.get("retrieved") is None or not (stored or entry["retrieved"]):
        return stored
    found: list[Card] = []
    for rank, document in enumerate(entry["retrieved"], start=1):
        told = {"role": Role.RETRIEVED.value, "document": {"rank": rank}}
        if document.get("text"):
            found.append({"type": "text", "text": document["text"], **told})
        if document.get("picture"):
            found.append({"type": "image", "text": None, "image": _file(uri, document["picture"]), **told})
    words = {"type": "text", "role": Role.CAPTION.value, "text": entry.get("prompt")}
    own = [segment for segment in stored if segment["role"] != Role.RETRIEVED] or [words]
    instructions = sum(segment["role"] == Role.INSTRUCTION for segment in own)
    return [*own[:instructions], *found, *own[instructions:]]


def _file(uri: str, name: Any) -> bytes | None:
    """A file of the folder as it was made; names come from a file, so only their last part counts.

    Raises:
        DataError: damaged or missing.
    """
    place = join(uri, str(name).rpartition("/")[2] or "-")
    is_there = exists(place)
    check_certified(place, must_list=is_there)
    return read_bytes(place) if is_there else None


def own_segments(uri: str, entry: Card) -> list[Card]:
    """The segments of a prompt that is kept beside its video, as those of PROMPTS; [] when it is not."""
    kept = entry.get("segments") or []
    pictures = [_file(uri, segment["picture"]) if segment["picture"] else None for segment in kept]
    return [
        {**segment, "image": picture, "document": None} for segment, picture in zip(kept, pictures, strict=True)
    ]


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
