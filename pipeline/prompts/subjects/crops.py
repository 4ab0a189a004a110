"""The table of crops: what the finder says of each phrase in each frame, and the picture that it gives.

One row a phrase and frame, found or not, with its fate; one more for the place that the caption names, shown
without the things. Made once (`vimi-data subjects`), read by `vimi-data instruct`, which finds the rows of a
clip by the table of places beside it.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
from PIL import Image

from infra.pictures import PictureError, decode_picture, fit_inside
from infra.storage import absolute, join
from pipeline.media.clip import read_frames
from pipeline.prompts.subjects import cutout
from pipeline.prompts.subjects.cutout import Picture
from pipeline.prompts.subjects.entities import Entity, background, find_entities
from pipeline.prompts.subjects.finder import FRAME_FRACS, SubjectFinder, best_frame, why_no_place
from pipeline.prompts.subjects.saliency import SIDE_PX
from pipeline.prompts.subjects.verdict import Found, Phrases, Reason, Verdict
from pipeline.schema import CROPS, Media, Role, RowError, Status, crop_id
from pipeline.shards import PLACES_FILE, open_part

Row = dict[str, Any]
Place = tuple[str, int]
"""A file of the table and a row group of it."""
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

    def find() -> list[Row]:
        phrases = Phrases.of(row["caption"])
        if not phrases.subjects:
            raise RowError(Status.FILTERED_NO_SUBJECT, Reason.NO_SUBJECT)
        fracs = (0.0,) if row["media"] == Media.IMAGE else FRAME_FRACS
        found = read_frames(row, fracs, local_uri=local_uri)
        order = random.permutation(len(fracs))
        of = {**row, "from_target": found.from_target}
        return _crops_of(of, phrases, [found.frames[i] for i in order], [fracs[i] for i in order], finder)

    return _or_reason(row, find)


def document_crops(row: Row, finder: SubjectFinder, *, at_most: int) -> list[Row]:
    """The crops of the pictures that were retrieved for a clip, best document first; each has a row.

    The places in them are not looked for: they would never be shown.
    """
    crops: list[Row] = []
    for origin, words, image in list(_documents(row))[:at_most]:
        of = {**row, **{name: origin[name] for name in ("source_uri", "source_sha256", "start_s", "end_s")}}
        of |= {"clip_source": source_key(row), "doc_id": origin["doc_id"]}
        crops += _or_reason(of, partial(_of_document, of, words, image, finder))
    return crops


def _of_document(row: Row, words: str, image: bytes, finder: SubjectFinder) -> list[Row]:
    phrases = Phrases.of(words)
    if not phrases.subjects:
        raise RowError(Status.FILTERED_NO_SUBJECT, Reason.NO_SUBJECT)
    try:
        frame = np.asarray(decode_picture(image).convert("RGB"))
    except PictureError as error:
        raise RowError(Status.UNDECODABLE, str(error)) from error
    return _crops_of(row, phrases, [frame], [0.0], finder)


def _or_reason(row: Row, find: Callable[[], list[Row]]) -> list[Row]:
    """What is found of a clip or document, or the row that says why nothing can be."""
    try:
        return find()
    except RowError as error:
        return [_without_picture(row, error.status, str(error))]
    except Exception as error:  # noqa: BLE001 - the row boundary: one bad row must not stop the job
        return [_without_picture(row, Status.BAD_ROW, f"{type(error).__name__}: {error}"[:300])]


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
    place = None if row.get("doc_id") else background(list(phrases.entities))
    if place is not None:
        best = best_frame(verdicts)
        rows.append(_place(row, place, best, why_no_place(phrases, verdicts, best), frames, fracs))
    clip = finder.clip
    shown = [crop for crop in rows if crop["status"] == Status.OK]
    if clip is not None and shown:
        vectors = clip.encode_images([Image.open(io.BytesIO(crop["image"])) for crop in shown])
        for crop, vector in zip(shown, vectors, strict=True):
            crop["vector"] = vector.tolist()
    return rows


def _base(row: Row) -> Row:
    names = ("clip_id", "source_uri", "source_sha256", "start_s", "end_s", "split")
    key = row.get("clip_source") or source_key(row)
    of = {"clip_source": key, "doc_id": row.get("doc_id"), "from_target": row.get("from_target", False)}
    return {**EMPTY, **{name: row[name] for name in names}, **of}


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


def _place(
    row: Row,
    entity: Entity,
    best: list[Found],
    why_not: Reason | None,
    frames: Sequence[np.ndarray],
    fracs: Sequence[float],
) -> Row:
    """The place without the things that were cut out of the `best` frame, or `why_not`."""
    number = best[0].frame if best else 0
    made = _named(row, entity, fracs[number])
    if why_not is not None:
        shown = {"image": cutout.encode(fit_inside(Image.fromarray(frames[number]), LEFT_OUT_PX))}
        return {**made, **shown, "status": Status.FILTERED_NO_SUBJECT.value, "error": str(why_not)}
    image = cutout.background_picture(frames[number], [one.mask for one in best], SIDE_PX)
    return {**made, "image": cutout.encode(image), "score": 1.0, "status": Status.OK.value, "error": None}


def reason_of(crop: Row) -> str:
    """Why a row has no picture, as it is counted: the error of a dead one may name its file."""
    return crop["error"] if Status(crop["status"]).is_filtered else crop["status"]


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


def crops_key(row: Row, by: Literal["clip_id", "clip_source"]) -> str:
    """What a row of PROMPTS has in common with its crops, in their column `by`."""
    return row["clip_id"] if by == "clip_id" else source_key(row)


def places_of(crops: Sequence[Row], file: str, *, row_group_rows: int) -> list[Row]:
    """Rows of `schema.CROP_PLACES` for a file of crops: which row groups hold which clips."""
    places = {(row["clip_id"], row["clip_source"], n // row_group_rows): None for n, row in enumerate(crops)}
    return [
        {"clip_id": clip, "clip_source": source, "file": file, "row_group": group}
        for clip, source, group in places
    ]


def find_places(folder: str, by: str) -> dict[str, list[Place]]:
    """Clip or source (`by` clip_id or clip_source) -> where its crops lie, in the table's order."""
    found: dict[str, dict[Place, None]] = {}
    with open_part(join(absolute(folder), PLACES_FILE)) as table:
        for batch in table.iter_batches(columns=[by, "file", "row_group"]):
            for row in batch.to_pylist():
                found.setdefault(row[by], {})[row["file"], row["row_group"]] = None
    return {key: list(places) for key, places in found.items()}


def read_crops(folder: str, places: Iterable[Place], wanted: set[str], *, by: str) -> dict[str, list[Row]]:
    """Clip or source -> its crops and those of its clips' documents, in the table's order.

    Nothing but the row groups at `places` is read.
    """
    found: dict[str, list[Row]] = {}
    columns = [name for name in CROPS.names if name not in ("box", "mask")]
    for file, places_there in groupby(places, key=lambda place: place[0]):
        with open_part(join(absolute(folder), file)) as part:
            for _, group in places_there:
                for crop in part.read_row_group(group, columns).to_pylist():
                    if crop[by] in wanted:
                        vector = crop["vector"]
                        crop["vector"] = None if vector is None else np.asarray(vector, np.float64)
                        found.setdefault(crop[by], []).append(crop)
    return found
