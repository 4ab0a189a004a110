"""The table of crops: what the finder says of each phrase in each frame, and the picture that it gives.

One row a phrase and frame, found or not, with its fate; one more for the place that the caption names, shown
without the things. Made once (`vimi-data subjects`), read by `vimi-data instruct`.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from infra.certificate import require_certificate
from infra.pictures import PictureError, decode_picture, fit_inside
from infra.storage import absolute
from pipeline.media.clip import read_frames
from pipeline.prompts.subjects import cutout
from pipeline.prompts.subjects.cutout import Picture
from pipeline.prompts.subjects.entities import Entity, background, find_entities
from pipeline.prompts.subjects.finder import FRAME_FRACS, SubjectFinder, best_frame
from pipeline.prompts.subjects.saliency import SIDE_PX
from pipeline.prompts.subjects.verdict import Found, Phrases, Reason, Verdict
from pipeline.schema import Role, RowError, Status, crop_id
from pipeline.shards import open_part, shards_of

Row = dict[str, Any]
JOB = "subjects"
LEFT_OUT_PX = 144
"""Side of the picture of what is left out: to be looked at, never to be trained on. Ours."""
EMPTY: Row = dict.fromkeys(
    ["phrase", "head", "start", "end", "nature", "box", "mask", "image", "vector", "score", "frac", "doc_id"]
)


def clip_crops(
    row: Row, finder: SubjectFinder, random: np.random.Generator, *, local_uri: str | None
) -> list[Row]:
    """The crops of one clip; at least one row, which says why there is no picture.

    `row` is of PROMPTS; `random` of this clip alone gives the order in which frames are looked at.
    """
    phrases = Phrases.of(row["caption"])
    if not phrases.subjects:
        return [_without_picture(row, Status.FILTERED_NO_SUBJECT, Reason.NO_SUBJECT)]
    try:
        found = read_frames(row, FRAME_FRACS, local_uri=local_uri)
    except RowError as error:
        return [_without_picture(row, error.status, str(error))]
    order = random.permutation(len(FRAME_FRACS))
    frames = [found.frames[i] for i in order]
    return _crops_of(row, phrases, frames, [FRAME_FRACS[i] for i in order], finder)


def document_crops(row: Row, finder: SubjectFinder, *, at_most: int) -> list[Row]:
    """The crops of the pictures that were retrieved for a clip, best document first: those with a picture."""
    crops: list[Row] = []
    for origin, words, image in list(_documents(row))[:at_most]:
        phrases = Phrases.of(words)
        if not phrases.subjects:
            continue
        try:
            frame = np.asarray(decode_picture(image).convert("RGB"))
        except PictureError:
            continue
        of = {**row, **{name: origin[name] for name in ("source_uri", "source_sha256", "start_s", "end_s")}}
        of["clip_source"] = source_key(row)
        made = _crops_of({**of, "doc_id": origin["doc_id"]}, phrases, [frame], [0.0], finder)
        crops += [crop for crop in made if crop["status"] == Status.OK and crop["nature"] != "place"]
    return crops


def _documents(row: Row) -> Iterator[tuple[Row, str, bytes]]:
    """Provenance, text and picture of each retrieved document, by rank."""
    texts: dict[str, str] = {}
    for segment in row["segments"] or []:
        origin = segment["document"]
        if not origin:
            continue
        if segment["type"] == "text":
            texts[origin["doc_id"]] = segment["text"] or ""
        elif segment["image"]:
            yield origin, texts.get(origin["doc_id"], ""), segment["image"]


def _crops_of(
    row: Row, phrases: Phrases, frames: Sequence[np.ndarray], fracs: Sequence[float], finder: SubjectFinder
) -> list[Row]:
    verdicts = finder.finder.find(frames, phrases)
    rows = [_crop(row, verdict, frames, fracs) for verdict in verdicts]
    place, best = background(list(phrases.entities)), best_frame(verdicts)
    if place is not None and best:
        image = cutout.background_picture(frames[best[0].frame], [one.mask for one in best], SIDE_PX)
        rows.append(_place(row, place, image, fracs[best[0].frame]))
    clip = finder.clip
    shown = [crop for crop in rows if crop["status"] == Status.OK]
    if clip is not None and shown:
        vectors = clip.encode_images([Image.open(io.BytesIO(crop["image"])) for crop in shown])
        for crop, vector in zip(shown, vectors, strict=True):
            crop["vector"] = vector.tolist()
    return rows


def _base(row: Row) -> Row:
    names = ("clip_id", "source_uri", "source_sha256", "start_s", "end_s")
    key = row.get("clip_source") or source_key(row)
    return {**EMPTY, **{name: row[name] for name in names}, "clip_source": key, "doc_id": row.get("doc_id")}


def _without_picture(row: Row, status: Status, error: str) -> Row:
    made = {**_base(row), "status": status.value, "error": str(error)}
    return {**made, "crop_id": crop_id(row["clip_id"], row.get("doc_id"), None, None)}


def _named(row: Row, entity: Entity, frac: float) -> Row:
    return {
        **_base(row),
        "crop_id": crop_id(row["clip_id"], row.get("doc_id"), entity.start, frac),
        "frac": frac,
        "phrase": entity.text,
        "head": entity.head,
        "start": entity.start,
        "end": entity.end,
        "nature": entity.nature,
    }


def _crop(row: Row, verdict: Verdict, frames: Sequence[np.ndarray], fracs: Sequence[float]) -> Row:
    made = _named(row, verdict.entity, fracs[verdict.frame])
    frame = frames[verdict.frame]
    if not isinstance(verdict, Found):
        seen = (
            Image.fromarray(frame)
            if verdict.mask is None
            else cutout.subject_picture(frame, verdict.mask, SIDE_PX)
        )
        shown = {"image": cutout.encode(fit_inside(seen, LEFT_OUT_PX))}
        return {**made, **shown, "status": Status.FILTERED_NO_SUBJECT.value, "error": str(verdict.reason)}
    left, top, right, bottom = verdict.mask.box
    alpha = (verdict.mask.alpha[top:bottom, left:right] * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(alpha).save(buffer, "PNG")
    picture = cutout.subject_picture(frame, verdict.mask, SIDE_PX)
    shown = {"box": list(verdict.mask.box), "mask": buffer.getvalue(), "image": cutout.encode(picture)}
    return {**made, **shown, "score": verdict.score, "status": Status.OK.value, "error": None}


def _place(row: Row, entity: Entity, image: Image.Image, frac: float) -> Row:
    made = {**_named(row, entity, frac), "image": cutout.encode(image)}
    return {**made, "score": 1.0, "status": Status.OK.value, "error": None}


def own_pictures(crops: Sequence[Row], *, at_most: int) -> list[Row]:
    """Of a clip's own crops those of the frame that shows most of its phrases, the surest of these."""
    frames: dict[float, list[Row]] = {}
    for crop in crops:
        if crop["status"] == Status.OK and crop["nature"] != "place" and crop["doc_id"] is None:
            frames.setdefault(crop["frac"], []).append(crop)
    best = max(frames.values(), key=lambda found: (len(found), sum(c["score"] for c in found)), default=[])
    return best[:at_most]


def as_picture(target: Row, caption: str, role: Role, shown: Row) -> Picture:
    """What `shown` shows in the place of `target`'s words in the target's caption."""
    entity = next(e for e in find_entities(caption) if e.start == target["start"])
    return Picture(entity, role, shown["image"])


def source_key(row: Row) -> str:
    """What clips of the same parent have in common."""
    return row["source_sha256"] or row["source_uri"] or row["clip_id"]


def read_crops(folder: str, sources: Iterable[str]) -> dict[str, list[Row]]:
    """Source -> the crops of its clips and of their documents, in the table's order.

    Only the row groups that hold one of them are read whole.
    """
    wanted, found = set(sources), dict[str, list[Row]]()
    certificate = require_certificate(folder, job=JOB, made_by="vimi-data subjects")
    for uri in shards_of(absolute(folder), certificate):
        part = open_part(uri)
        for number in range(part.num_row_groups):
            keys = part.read_row_group(number, ["clip_source"])["clip_source"].to_pylist()
            if wanted.isdisjoint(keys):
                continue
            for crop in part.read_row_group(number).to_pylist():
                if crop["clip_source"] in wanted:
                    found.setdefault(crop["clip_source"], []).append(crop)
    return found
