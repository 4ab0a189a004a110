"""Finds the videos of a place, each with its prompt: whatever lies there is counted, nothing skipped silently.

    a folder of files           every file but sidecars; `prompts.jsonl` beside them gives the prompts
    a folder of sample          its samples.json
    a folder of crawl           its good video clips
    a folder of prompt shards   the targets of its rows

A line of prompts.jsonl names its video; `text` is the prompt in words alone, where pictures stand for some, and
`words` are those that they stand for:

    {"video": "a.mp4", "prompt": "A <image> runs", "images": ["d.png"], "text": "A dog runs", "words": ["dog"]}
"""

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.certificate import input_certificate
from infra.errors import ConfigError, DataError
from infra.samples import SAMPLES, read_samples
from infra.storage import (
    absolute,
    exists,
    is_file,
    is_remote,
    join,
    list_files,
    read_bytes,
    size_and_time,
)
from pipeline.media.store import file_uri
from pipeline.schema import ROLES, Media, Role, Status, TargetKind
from pipeline.shards import SHARD_JOBS, ShardSet, open_part, shards_of

PROMPTS = "prompts.jsonl"
SIDECARS = frozenset(
    {"json", "jsonl", "txt", "md", "csv", "tsv", "yaml", "yml", "html", "log", "parquet", "npy", "lock"}
    | {"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "avif", "srt", "vtt"}
)
"""Endings of files that are no videos and aren't meant to be; all others are tried."""
PLACEHOLDER = "<image>"
Payload = dict[str, Any]
"""One video: name, kind (file, clip, row or unreadable), where its bytes are, `prompt` {text, references} or
None, `scale` by which its file is enlarged, if it is, `reason` why it is unreadable."""
PLACES = "a folder of video files, or the output of sample, crawl, augment, instruct or benchmark"
CLIP_COLUMNS = ["clip_id", "media", "caption", "local_uri", "source_sha256", "start_s", "end_s", "status"]
ROW_COLUMNS = ["prompt_id", "clip_id", "media", "caption", "source_uri", "source_sha256", "start_s", "end_s"]
TARGET_COLUMNS = ["target.kind"]


def find_videos(place: str, *, only: Collection[str | None] | None = None) -> list[Payload]:
    """All videos of a place, in the order of their names.

    `only` names the rows of prompt shards that count; None = all.

    Raises:
        ConfigError: nothing is there, or a file.
    """
    if is_file(absolute(place)):
        raise ConfigError(f"{place} is a file", legal=PLACES, cure="give the folder that it lies in")
    found = _clips_or_files(absolute(place), only)
    if not found:
        raise ConfigError(f"no video in {place}", legal=PLACES)
    return sorted(found, key=lambda payload: payload["name"])


SAMPLE_JOBS = ("sample", "preview")
"""Whose folders have a samples.json: without it they are not taken for anybody's videos without prompts."""


def _clips_or_files(place: str, only: Collection[str | None] | None) -> list[Payload]:
    certificate = input_certificate(place)
    job = certificate.job if certificate else None
    if certificate is not None and job == "crawl":
        return [payload for part in shards_of(place, certificate) for payload in _clips(part)]
    if job in SHARD_JOBS:
        return list(_targets(place, only))
    if job in SAMPLE_JOBS or exists(join(place, SAMPLES)):
        return _samples(place)
    return _files(place)


def _files(place: str) -> list[Payload]:
    found = {name: why for name, why in list_entries(place).items() if _is_candidate(name)}
    prompts = read_prompts(place, [*found]) if exists(join(place, PROMPTS)) else {}
    payloads = [(_file(name, f"{place}/{name}", prompts.get(name)), why) for name, why in found.items()]
    return [p if why is None else {**p, "kind": "unreadable", "reason": why} for p, why in payloads]


def list_entries(place: str) -> dict[str, str | None]:
    """Names of all that lies below a place, in order, each with why it can't be read; None for a file.

    Links to folders are not followed, since one may lead back.
    """
    if is_remote(place):
        return dict.fromkeys(file[len(place) + 1 :] for file in list_files(place))
    found: dict[str, str | None] = {}

    def note(error: OSError) -> None:
        if error.filename != place:  # without which there is nothing to name
            found[_shown(error.filename, place)] = f"a folder that can't be listed: {error.strerror}"
        elif not isinstance(error, FileNotFoundError):
            raise error

    for folder, folders, files in os.walk(place, onerror=note):
        paths = [Path(folder, name) for name in (*folders, *files)]
        found |= {_shown(path, place): _fault(path) for path in paths if path.is_symlink() or not path.is_dir()}
    return dict(sorted(found.items()))


def _shown(path: str | Path, place: str) -> str:
    """The name below a place; bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")[len(place) + 1 :]


def _fault(path: Path) -> str | None:
    """Why a name is no file that can be read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"a link that leads nowhere: {error.strerror}"
    if stat.S_ISDIR(mode):
        return "a link to a folder, which is not followed: give that folder, or its files"
    if not stat.S_ISREG(mode):
        return "no file, but a pipe, a socket or a device"
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "a name that is not UTF-8: rename it"
    return None


def _is_candidate(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name.rpartition(".")[2].lower() not in SIDECARS


def _file(name: str, uri: str, prompt: dict[str, Any] | None) -> Payload:
    range_s = {"start_s": 0.0, "end_s": None}
    return {"kind": "file", "name": name, "uri": file_uri(uri), "prompt": prompt, **range_s}


class PromptLine(BaseModel):
    """A line of prompts.jsonl; keys that are not named here are the user's own."""

    model_config = ConfigDict(strict=True, frozen=True)
    video: str
    prompt: str | None = None
    text: str | None = None
    images: list[str] = []
    words: list[str] = []


LINE = '{"video": "a.mp4", "prompt": "A <image> runs.", "images": ["dog.png"]}'


def read_prompts(place: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Video -> {text, references} of prompts.jsonl.

    Raises:
        ConfigError: a line that is no prompt, of a video that isn't there, or the second of one; names the
            line.
    """
    file, found, known = join(place, PROMPTS), {}, set(names)
    # Not splitlines: a text may hold a line separator of Unicode, which JSON takes for a letter.
    for number, line in enumerate(read_bytes(file).decode("utf-8", "replace").split("\n"), start=1):
        if not line.strip():
            continue
        said = read_line(line, f"{file} line {number}")
        if said.video not in known:
            raise ConfigError(
                f"{file} line {number}: no video {said.video!r} there", legal="names of its files"
            )
        if said.video in found:
            raise ConfigError(
                f"{file} line {number}: a second prompt of {said.video!r}",
                legal="a line for each video",
                cure="leave one of them out",
            )
        images = [reference(image, place) for image in said.images]
        found[said.video] = {
            "text": said.text or plain(said.prompt or ""),
            "references": [image for image in images if image],
            "words": said.words,
        }
    return found


def read_line(line: str, where: str) -> PromptLine:
    """A line of prompts.jsonl.

    Raises:
        ConfigError: no JSON, a value of another type, or neither words nor a prompt.
    """
    try:
        said = PromptLine.model_validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(map(str, fault["loc"])) or "line"
        raise ConfigError(
            f"{where}: {name} = {repr(fault['input'])[:80]}: {fault['msg']}", legal=LINE
        ) from None
    if said.text is None and said.prompt is None:
        raise ConfigError(f"{where}: neither prompt nor text", legal=LINE)
    return said


def reference(image: str, beside: str) -> str | None:
    """The picture of a `path` or `role:path`; None for roles whose picture is no subject."""
    role, sep, path = image.partition(":")
    if not sep or role not in ROLES:
        role, path = Role.SUBJECT, image
    if role != Role.SUBJECT:
        return None
    return path if path.startswith("/") or is_remote(path) else join(beside, path)


def plain(prompt: str) -> str:
    """A prompt's words without its placeholders."""
    return " ".join(prompt.replace(PLACEHOLDER, " ").split())


def _samples(place: str) -> list[Payload]:
    """Of a folder of `vimi-train sample`.

    Raises:
        DataError: its samples.json is missing or damaged.
    """
    if not exists(join(place, SAMPLES)):
        raise DataError(f"{place} has lost its {SAMPLES}; cure: restore it, or sample into a new folder")
    entries = read_samples(place)
    return [
        _file(_last(e["video"]), join(place, _last(e["video"])), sampled_prompt(e, place))
        | {"scale": e.get("scale", 1)}
        for e in entries
    ]


def _last(name: str) -> str:
    return str(name).rpartition("/")[2]


def sampled_prompt(entry: dict[str, Any], place: str) -> dict[str, Any]:
    """{text, references} of a sample's own segments: a subject's picture also stands for its word."""
    words, references, names = [], [], []
    for segment in entry.get("segments") or []:
        is_subject = segment["role"] == Role.SUBJECT
        if segment["role"] == Role.CAPTION or (is_subject and segment.get("text")):
            words.append(segment["text"] or "")
        if is_subject and segment.get("picture"):
            references.append(join(place, _last(segment["picture"])))
            names.append(segment.get("text") or "")
    text = " ".join(filter(None, words)) or plain(entry.get("prompt") or "")
    return {"text": text, "references": references, "words": names}


def _clips(part: str) -> Iterator[Payload]:
    file = open_part(part)
    for group in range(file.num_row_groups):
        for row in file.read_row_group(group, columns=CLIP_COLUMNS).to_pylist():
            if row["status"] == Status.OK and row["media"] == Media.VIDEO:
                yield {
                    "kind": "clip",
                    "name": row["clip_id"],
                    "uri": row["local_uri"],
                    "source_sha256": row["source_sha256"],
                    "start_s": row["start_s"] or 0.0,
                    "end_s": row["end_s"] or None,
                    "prompt": {"text": row["caption"] or "", "references": []},
                }


def _targets(place: str, only: Collection[str | None] | None) -> Iterator[Payload]:
    """Targets of prompts that are videos, not pictures; a clip that several prompts refer to counts once."""
    shards, seen = ShardSet(place), set()
    for number in range(len(shards)):
        table = shards.read_row_group(number, ROW_COLUMNS + TARGET_COLUMNS)
        for place_in, row in enumerate(table.to_pylist()):
            counts = only is None or row["prompt_id"] in only
            if not counts or row["media"] != Media.VIDEO or not (row["target"] or {}).get("kind"):
                continue
            payload = _target(row, shards.uri, number, place_in)
            if payload["kind"] == "row":  # tasks of one clip carry its frames each
                key = row["clip_id"], row["start_s"], row["end_s"]
            else:
                key = payload["uri"], payload["start_s"], payload["end_s"]
            if key not in seen:
                seen.add(key)
                yield payload


def _target(row: dict[str, Any], shards: str, group: int, place_in: int) -> Payload:
    """What a row carries, or the part of the file that it refers to."""
    named = {"name": row["prompt_id"], "prompt": {"text": row["caption"], "references": []}}
    if row["target"]["kind"] == TargetKind.REFERENCE:
        place = {"kind": "clip", "uri": row["source_uri"], "source_sha256": row["source_sha256"]}
        return {**named, **place, "start_s": row["start_s"] or 0.0, "end_s": row["end_s"] or None}
    return {
        **named,
        "kind": "row",
        "uri": shards,
        "group": group,
        "row": place_in,
        "start_s": 0.0,
        "end_s": None,
    }


def listing_hash(payloads: list[Payload]) -> str:
    """What a place holds, as far as names, sizes, times of change and prompts tell; no video is read."""
    digest = hashlib.sha256()
    for payload in payloads:
        seen = size_and_time(payload["uri"].removesuffix("#file")) if payload["kind"] == "file" else (0, None)
        pictures = [
            size_and_time(p) for p in (payload["prompt"] or {}).get("references", ()) if not is_remote(p)
        ]
        parts = [payload["name"], seen, payload["start_s"], payload["end_s"], payload["prompt"], pictures]
        digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:16]
