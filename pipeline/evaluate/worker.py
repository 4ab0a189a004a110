"""What a worker of an evaluation does with one video: hash, look into the cache, decode, let networks look."""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from hashlib import sha256
from typing import Any, Protocol

import numpy as np

from infra.certificate import check_certified
from infra.pictures import PictureError
from infra.storage import read_bytes, sha256_file
from pipeline.evaluate.decode import FrameConfig, arguments, shrunk, target_part
from pipeline.evaluate.videos import Payload
from pipeline.journal import Receipt
from pipeline.media.clip import target_frames
from pipeline.media.isolate import Isolated
from pipeline.media.store import PIECE, open_media, read_media, row_errors
from pipeline.schema import RowError, Status, TargetKind, content_id
from pipeline.shards import ShardSet

DECODER = "pipeline.evaluate.decode:frames_of"
Keys = dict[str, str]


class Extractor(Protocol):
    """Gives features of a video and of its prompt; the trainer's networks are behind it."""

    @property
    def reads_pictures(self) -> bool: ...
    def video_keys(self, video_id: str, words: Sequence[str], only: Collection[str] | None) -> Keys: ...
    def missing(self, keys: Keys) -> list[str]: ...
    def video(self, keys: Keys, missing: Sequence[str], frames: np.ndarray, words: Sequence[str]) -> None: ...
    def text(self, text: str) -> Keys: ...
    def references(self, pictures: Sequence[bytes]) -> Keys: ...


class EvaluateWorker:
    """Unit payload -> receipt: the video's id, and the cache's keys of its features and of its prompt's,
    the hashes of its reference pictures.

    `make_extractor` is called once, in the worker's process; `timeout_s` is for decoding one video.
    """

    def __init__(self, make_extractor: Callable[[], Extractor], how: FrameConfig, timeout_s: float) -> None:
        self.extractor, self.how, self.timeout_s = make_extractor(), how, timeout_s
        self.shards: dict[str, ShardSet] = {}

    def __call__(self, payload: Payload) -> Receipt:
        payload = self._certified(payload)
        try:
            with row_errors():
                found = self._features(payload)
        except RowError as error:
            reason = str(error).replace(payload["uri"].removesuffix("#file"), payload["name"])
            return {"status": error.status.value, "error": reason, "notes": {error.status.value: 1}}
        return {"status": Status.OK.value, **found, "notes": {}}

    def _certified(self, payload: Payload) -> Payload:
        """The payload, with the target of a row that carries one.

        Raises:
            DataError: an output of ours is not as its job certified it: that is no fate of a row.
        """
        if payload["kind"] == "row":
            return with_target(payload, self.shards)
        files = [payload["uri"].removesuffix("#file")] if payload["kind"] == "file" else []
        for file in [*files, *(payload["prompt"] or {}).get("references", ())]:
            check_certified(file, must_list=False)
        return payload

    def _features(self, payload: Payload) -> dict[str, Any]:
        if payload["kind"] == "unreadable":
            raise RowError(Status.UNREACHABLE, payload["reason"])
        video_id, digest = self._id(payload)
        words = subjects(payload["prompt"])
        keys = self.extractor.video_keys(video_id, words, payload.get("features"))
        missing = self.extractor.missing(keys)
        if missing:
            self.extractor.video(keys, missing, self._frames(payload), words)
        return {"id": video_id, "sha256": digest, "features": keys, **self._prompt(payload["prompt"])}

    def _prompt(self, prompt: dict[str, Any] | None) -> dict[str, Any]:
        """Keys of a prompt's features, and the sha256 of its reference pictures."""
        if prompt is None:
            return {"prompt": {}, "references": []}
        texts = self.extractor.text(prompt["text"]) if prompt["text"] else {}
        try:
            places = prompt["references"] if self.extractor.reads_pictures else []
            pictures = [read_bytes(place) for place in places]
            keys = texts | self.extractor.references(pictures)
        except (OSError, PictureError) as error:
            raise RowError(Status.BAD_ROW, f"a reference picture can't be read: {error}") from error
        return {"prompt": keys, "references": [sha256(picture).hexdigest() for picture in pictures]}

    def _id(self, payload: Payload) -> tuple[str, str]:
        """What the frames are a function of: the part of the bytes, and their sha256."""
        how_shown = [payload["scale"]] if payload.get("scale", 1) > 1 else []
        if payload["kind"] == "row":
            target = payload["target"]
            digest = sha256(target["data"]).hexdigest()
            if target["kind"] == TargetKind.FRAMES:  # bare pixels don't say of which shape they are
                how_shown = [target[name] for name in ("num_frames", "height_px", "width_px", "fps")]
        else:
            digest = payload.get("source_sha256")
            if digest:
                open_media(payload["uri"], digest)  # refuses other bytes
            else:
                digest = _hash(payload["uri"])
        return content_id("video", digest, payload["start_s"], payload["end_s"], *how_shown), digest

    def _frames(self, payload: Payload) -> np.ndarray:
        return scored_frames(payload, self.how, partial(self.child.call, DECODER))

    @cached_property
    def child(self) -> Isolated:
        return Isolated(timeout_s=self.timeout_s)


def with_target(payload: Payload, shards: dict[str, ShardSet]) -> Payload:
    """The payload of a row with the target that the row carries; `shards` keeps what was opened."""
    place = payload["uri"]
    if place not in shards:
        shards[place] = ShardSet(place)
    table = shards[place].read_row_group(payload["group"], ["target"])
    return {**payload, "target": table["target"][payload["row"]].as_py()}


def scored_frames(payload: Payload, how: FrameConfig, decode: Callable[..., np.ndarray]) -> np.ndarray:
    """The frames of a video that are scored, uint8 `t h w 3`.

    Args:
        payload: one of a row has its target.
        how: which frames.
        decode: `frames_of`, or a call of it in another process.
    """
    if payload["kind"] == "row":
        target = payload["target"]
        if target["kind"] == TargetKind.FRAMES:
            return target_part(target_frames(target), target["fps"], how)
        payload = {**payload, "uri": target["data"]}
    return shrunk(decode(*arguments(how, payload)), payload.get("scale", 1))


def subjects(prompt: dict[str, Any] | None) -> list[str]:
    """Words that name what the reference pictures show; none unless each of them has one."""
    words = (prompt or {}).get("words") or []
    return words if len(words) == len((prompt or {}).get("references", ())) and all(words) else []


def _hash(uri: str) -> str:
    """Hex sha256 of the bytes at a `local_uri`."""
    return sha256(read_media(uri)).hexdigest() if PIECE.fullmatch(uri) else sha256_file(uri)
