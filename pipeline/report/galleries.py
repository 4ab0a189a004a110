"""The galleries of the corpus: clips as filmstrips, prompts with their documents and their targets."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from infra.storage import absolute
from pipeline.media.frames import clip_times, decode_frames, probe
from pipeline.media.row_frames import read_frames, target_frames
from pipeline.report.album import Album
from pipeline.report.read import read_columns, spread
from pipeline.schema import Media, Role, RowError, Status, TargetKind
from pipeline.shards import ShardSet

STRIP_FRAMES, TARGET_FRAMES = 5, 16
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
