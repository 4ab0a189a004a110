"""One slice of the captions -> targets, documents, prompts: one shard and its receipt."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from infra.clip import Clip, ClipConfig, load_clip
from infra.storage import join
from pipeline.journal import Receipt
from pipeline.media.isolate import MEMORY_BYTES, Isolated
from pipeline.memory import Memory, open_memory, require_model
from pipeline.memory.embed.pictures import read_picture
from pipeline.memory.embed.worker import read_slice
from pipeline.memory.retrieve.documents import Documents, load_documents
from pipeline.memory.store import clip_configs
from pipeline.memory.vectors import frame_mean
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.match import (
    Match,
    Matcher,
    document_segments,
    excluded,
    open_matcher,
    own_documents,
)
from pipeline.prompts.augment.relevance import Sums, measure
from pipeline.prompts.augment.target import Row, Target, make_target
from pipeline.prompts.exclusion import Exclusion, read_exclusion
from pipeline.schema import CLIPS, ORIGIN, PROMPTS, Role, RowError, Status, TargetKind, Task, prompt_id
from pipeline.shards import rejected_row, shard_name, write_shard

DECODE_TIMEOUT_S = 120.0
"""Time that decoding one clip may take; then its row is `timeout`. As in crawl. Ours."""


class AugmentWorker:
    """Payload -> receipt; the memory's arrays and the CLIP are loaded when first needed, and kept.

    Args:
        config: of the job.
        config_hash: names what the output depends on.
    """

    def __init__(self, config: AugmentConfig, config_hash: str) -> None:
        self.config, self.config_hash = config, config_hash

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        rows = [row for piece in payload["pieces"] for row in good_rows(*piece)]
        silent = [row for row in rows if not has_caption(row)]
        rows, left_out = self.without_excluded([row for row in rows if has_caption(row)])
        left_out += [rejected_row(row, Status.FILTERED_NO_CAPTION, "no caption") for row in silent]
        rows, targets, failed = self.with_targets(rows)
        matches, relevance = self.match(rows, targets)
        pictures = self.pictures(matches)
        prompts = [
            self._prompt(row, target, match, pictures)
            for row, target, match in zip(rows, targets, matches, strict=True)
        ]
        file = None
        if prompts:
            place = join(self.config.out, shard_name(payload["number"]))
            entry = write_shard(place, prompts, PROMPTS, row_group_rows=self.config.row_group_rows)
            file = entry.model_dump()
        lost = [*left_out, *failed]
        return {
            "file": file,
            "rejected": lost,
            "max_similarity": self.matcher.guard.max_similarity if any(m.docs for m in matches) else None,
            "refused": dict(sum((Counter(match.refused) for match in matches), Counter())),
            "documents": dict(Counter(str(len(match.docs)) for match in matches)),
            "relevance": relevance,
            "notes": dict(Counter(row["status"] for row in lost)),
        }

    @cached_property
    def memory(self) -> Memory:
        return open_memory(self.config.memory, version=self.config.memory_version)

    @cached_property
    def documents(self) -> Documents:
        return load_documents(self.memory, self.config.retrieve.analysis)

    @cached_property
    def exclusion(self) -> Exclusion:
        guard = self.config.guard
        if guard.exclude is None:
            return Exclusion()
        return read_exclusion(guard.exclude, source_pattern=guard.source_pattern)

    @cached_property
    def decoder(self) -> Isolated:
        return Isolated(timeout_s=DECODE_TIMEOUT_S)

    @cached_property
    def clip(self) -> Clip:
        clip = load_clip(clip_config(self.config, self.memory))
        require_model(self.memory, clip.model_hash, name=clip.name)
        return clip

    @cached_property
    def matcher(self) -> Matcher:
        config = self.config
        return open_matcher(config.retrieve, config.guard, self.exclusion, self.documents, self.memory)

    def without_excluded(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """The rows that may be trained on, and the rejected ones."""
        reasons = excluded(rows, self.config.guard, self.exclusion)
        kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        left_out = [
            rejected_row(row, Status.FILTERED_EVAL_SPLIT, reason)
            for row, reason in zip(rows, reasons, strict=True)
            if reason is not None
        ]
        return kept, left_out

    def with_targets(self, rows: list[Row]) -> tuple[list[Row], list[Target], list[Row]]:
        """The rows whose target could be made, their targets, and the rejected rows."""
        kept, targets, failed = [], [], []
        for row in rows:
            try:
                targets.append(self._target(row))
                kept.append(row)
            except RowError as error:
                failed.append(rejected_row(row, error.status, str(error)))
        return kept, targets, failed

    def _target(self, row: Row) -> Target:
        """The row's target; a decoder that hangs or crashes costs this row alone."""
        if self.config.target.kind == TargetKind.REFERENCE:
            return make_target(row, self.config.target)
        try:
            return self.decoder.call("pipeline.prompts.augment.target:make_target", row, self.config.target)
        except MemoryError:
            raise RowError(Status.TOO_LARGE, f"needs more than {MEMORY_BYTES:,} bytes") from None

    def match(self, rows: list[Row], targets: list[Target]) -> tuple[list[Match], Sums]:
        """The documents of each row, and what they say of its target."""
        if not rows or not self.config.retrieve.k:
            return [Match() for _ in rows], {}
        own = own_documents(rows, self.documents)
        captions = self._caption_vectors(rows, own)
        pictures = self._picture_vectors(rows, own)
        matches = self.matcher.match(
            rows,
            phashes=[target.phashes for target in targets],
            pictures=pictures,
            captions=captions,
            queries=self._query_vectors(rows, captions),
        )
        analysis = self.config.retrieve.analysis
        return matches, measure(rows, matches, own, pictures, self.documents, analysis)

    def _caption_vectors(self, rows: list[Row], own: np.ndarray) -> list[np.ndarray | None]:
        """Text vectors: the memory's where the clip is in it, else computed where that is wanted."""
        vectors: list[np.ndarray | None] = [self.documents.text[i] if i >= 0 else None for i in own]
        wanted = self.config.vectors == "all" or self.config.retrieve.method.needs_vectors
        missing = [i for i, vector in enumerate(vectors) if vector is None and wanted]
        if missing:
            texts = [rows[i]["caption"] or "" for i in missing]
            for i, vector in zip(missing, self.clip.encode_texts(texts), strict=True):
                vectors[i] = vector
        return vectors

    def _query_vectors(self, rows: list[Row], captions: Sequence[np.ndarray | None]) -> np.ndarray | None:
        if not self.config.retrieve.method.needs_vectors:
            return None
        return np.stack([np.asarray(vector, np.float32) for vector in captions if vector is not None])

    def _picture_vectors(self, rows: list[Row], own: np.ndarray) -> list[np.ndarray | None]:
        """Picture vectors for the guard: the memory's where the clip is in it, else computed."""
        vectors: list[np.ndarray | None] = [self.documents.image[i] if i >= 0 else None for i in own]
        missing = [i for i, vector in enumerate(vectors) if vector is None]
        if missing and self.config.vectors == "all" and self.config.guard.max_similarity != 1:
            for i in missing:
                vectors[i] = clip_picture_vector(rows[i], self.clip)
        return vectors

    def pictures(self, matches: list[Match]) -> dict[str, bytes]:
        """JPEGs of the chosen documents only."""
        numbers = sorted({doc for match in matches for doc in match.docs})
        ids = [self.documents.ids[number].decode() for number in numbers]
        return self.memory.images(ids) if ids else {}

    def _prompt(self, row: Row, target: Target, match: Match, pictures: dict[str, bytes]) -> Row:
        fewer = len(match.docs) < self.config.retrieve.k
        return {
            "prompt_id": prompt_id(Task.PRETRAIN, row["clip_id"], self.config_hash),
            "task": Task.PRETRAIN.value,
            "clip_id": row["clip_id"],
            "media": row["media"],
            "caption": row["caption"],
            "segments": [
                *document_segments(match, self.documents, pictures, self.config.retrieve.retriever),
                {"type": "text", "role": Role.CAPTION.value, "text": row["caption"]},
            ],
            "num_documents": len(match.docs),
            "flags": ["fewer_than_k"] if fewer else [],
            "target": target.value,
            **{name: row[name] for name in ORIGIN},
            "fps": row["fps"],
            "memory_version": self.memory.version,
            "model_hash": self.memory.model_hash,
            "config_hash": self.config_hash,
        }


def clip_config(config: AugmentConfig, memory: Memory) -> ClipConfig:
    """The CLIP to load: the one that was asked for, else the one that the memory was built with."""
    return config.clip or next(iter(clip_configs(memory).values()))


def clip_picture_vector(row: Row, clip: Clip) -> np.ndarray | None:
    """The unit image vector of a clip as `build-index` would make it; None if it can't be read."""
    try:
        picture = read_picture(row, clip.preprocessing)
    except RowError:
        return None
    return frame_mean(clip.encode_pixels(picture.pixels), [len(picture.pixels)])[0]


def good_rows(uri: str, start: int, rows: int) -> list[Row]:
    """The usable ones of rows [start, start + rows) of a part."""
    table = read_slice(uri, start, rows, CLIPS.names)
    return [row for row in table.to_pylist() if row["status"] == Status.OK]


def has_caption(row: Row) -> bool:
    return bool((row["caption"] or "").strip())
