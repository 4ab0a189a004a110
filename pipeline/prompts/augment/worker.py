"""One slice of the captions -> targets, documents, prompts: one shard and its receipt."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from infra.clip import Clip
from infra.clip.preprocess import Preprocessing
from infra.storage import join
from pipeline.journal import Receipt
from pipeline.media.isolate import MEMORY_BYTES, Isolated
from pipeline.memory.embed.pictures import KEY_FRAMES, read_picture
from pipeline.memory.embed.streams import CPU_BATCH, batches
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.vectors import frame_mean
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.join import found
from pipeline.prompts.augment.match import Match, Matcher, document_segments, shown
from pipeline.prompts.augment.relevance import Sums, measure
from pipeline.prompts.augment.slices import Retrieving
from pipeline.prompts.augment.target import Row, Target, make_target
from pipeline.schema import ORIGIN, PROMPTS, Role, RowError, Status, TargetKind, Task, prompt_id
from pipeline.shards import rejected_row, shard_name, write_shard

DECODE_TIMEOUT_S = 120.0
"""Time that decoding one clip may take; then its row is `timeout`. As in crawl. Ours."""


class AugmentWorker(Retrieving):
    """Payload -> receipt.

    Args:
        config: of the job.
        config_hash: names what the output depends on.
        joined: what the join found lies in files; False = this worker searches for itself.
    """

    def __init__(self, config: AugmentConfig, config_hash: str, *, joined: bool = False) -> None:
        super().__init__(config)
        self.config_hash, self.joined = config_hash, joined

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        kept, lost = self.read(payload)
        rows, targets, failed = self.with_targets(kept)
        joined = self.candidates(payload, kept, rows) if self.joined else None
        matches, relevance = self.match(rows, targets, joined)
        documents = shown(self.memory, matches)
        prompts = [
            self._prompt(row, target, match, documents)
            for row, target, match in zip(rows, targets, matches, strict=True)
        ]
        file = None
        if prompts:
            place = join(self.config.out, shard_name(payload["number"]))
            entry = write_shard(place, prompts, PROMPTS, row_group_rows=self.config.row_group_rows)
            file = entry.model_dump()
        lost = [*lost, *failed]
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
    def decoder(self) -> Isolated:
        return Isolated(timeout_s=DECODE_TIMEOUT_S)

    @cached_property
    def matcher(self) -> Matcher:
        config = self.config
        return Matcher(self.memory, config.retrieve, config.guard, self.exclusion)

    def candidates(self, payload: dict[str, Any], kept: Sequence[Row], rows: Sequence[Row]) -> list[np.ndarray]:
        """What the join found for these of the slice's rows."""
        place = {row["clip_id"]: n for n, row in enumerate(kept)}
        every = found(self.config, payload, len(kept), len(self.memory.shards))
        return [every[place[row["clip_id"]]] for row in rows]

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

    def match(
        self, rows: list[Row], targets: list[Target], found: list[np.ndarray] | None
    ) -> tuple[list[Match], Sums]:
        """The documents of each row, and what they say of its target."""
        if not rows or not self.config.retrieve.k:
            return [Match() for _ in rows], {}
        own = self.own(rows)
        captions, pictures = self.caption_vectors(rows, own), self._picture_vectors(rows, own)
        queries = None
        if self.config.retrieve.method.needs_vectors:
            queries = np.stack([np.asarray(vector, np.float32) for vector in captions if vector is not None])
        matches = self.matcher.match(
            rows,
            phashes=[target.phashes for target in targets],
            pictures=pictures,
            captions=captions,
            queries=queries,
            found=found,
        )
        return matches, measure(rows, matches, pictures, self.memory)

    def _picture_vectors(
        self, rows: list[Row], own: dict[str, dict[str, np.ndarray]]
    ) -> list[np.ndarray | None]:
        """Picture vectors for the guard: the memory's where the clip is in it, else computed."""
        vectors: list[np.ndarray | None] = [own.get(row_doc_id(row), {}).get("image") for row in rows]
        missing = [i for i, vector in enumerate(vectors) if vector is None]
        if missing and self.config.vectors == "all" and self.config.guard.max_similarity != 1:
            for some in batches(missing, CPU_BATCH // KEY_FRAMES):
                for i, vector in zip(some, picture_vectors([rows[i] for i in some], self.clip), strict=True):
                    vectors[i] = vector
        return vectors

    def _prompt(self, row: Row, target: Target, match: Match, documents: dict[int, Row]) -> Row:
        fewer = len(match.docs) < self.config.retrieve.k
        return {
            "prompt_id": prompt_id(Task.PRETRAIN, row["clip_id"], self.config_hash),
            "task": Task.PRETRAIN.value,
            "clip_id": row["clip_id"],
            "media": row["media"],
            "caption": row["caption"],
            "segments": [
                *document_segments(match, documents, self.config.retrieve.retriever),
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


def picture_vectors(rows: Sequence[Row], clip: Clip) -> list[np.ndarray | None]:
    """The unit image vectors of clips as `build-index` would make them; None where one can't be read."""
    frames = [_frames(row, clip.preprocessing) for row in rows]
    there = [pixels for pixels in frames if pixels is not None]
    if not there:
        return [None for _ in rows]
    means = iter(frame_mean(clip.encode_pixels(np.concatenate(there)), [len(pixels) for pixels in there]))
    return [None if pixels is None else next(means) for pixels in frames]


def _frames(row: Row, preprocessing: Preprocessing) -> np.ndarray | None:
    """uint8 `f h w 3`; None if they can't be read."""
    try:
        return read_picture(row, preprocessing).pixels
    except RowError:
        return None
