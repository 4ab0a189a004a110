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
from pipeline.memory import Memory, open_memory, require_model, store
from pipeline.memory.embed.pictures import read_picture
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.vectors import frame_mean, vectors_numpy
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.facts import excluded
from pipeline.prompts.augment.match import Match, Matcher, document_segments, shown
from pipeline.prompts.augment.relevance import Sums, measure
from pipeline.prompts.augment.target import Row, Target, make_target
from pipeline.prompts.exclusion import Exclusion, read_exclusion
from pipeline.schema import CLIPS, ORIGIN, PROMPTS, Role, RowError, Status, TargetKind, Task, prompt_id
from pipeline.shards import read_slice, rejected_row, shard_name, write_shard

DECODE_TIMEOUT_S = 120.0
"""Time that decoding one clip may take; then its row is `timeout`. As in crawl. Ours."""


class Retrieving:
    """What every worker of the job needs; opened and loaded when first asked for, and kept."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    @cached_property
    def memory(self) -> Memory:
        """The job has read all shards through (`join.check_units`)."""
        config = self.config
        return open_memory(config.memory, version=config.memory_version, read_through=False)

    @cached_property
    def exclusion(self) -> Exclusion:
        guard = self.config.guard
        if guard.exclude is None:
            return Exclusion()
        return read_exclusion(guard.exclude, source_pattern=guard.source_pattern)

    @cached_property
    def clip(self) -> Clip:
        clip = load_clip(clip_config(self.config, self.memory))
        require_model(self.memory, clip.model_hash, name=clip.name)
        return clip

    def read(self, payload: dict[str, Any]) -> tuple[list[Row], list[Row]]:
        """(the rows of a slice that may be trained on, the rejected ones)."""
        rows = [row for piece in payload["pieces"] for row in good_rows(*piece)]
        lost = [rejected_row(r, Status.FILTERED_NO_CAPTION, "no caption") for r in rows if not has_caption(r)]
        rows = [row for row in rows if has_caption(row)]
        kept = []
        for row, reason in zip(rows, excluded(rows, self.config.guard, self.exclusion), strict=True):
            if reason is None:
                kept.append(row)
            else:
                lost.append(rejected_row(row, Status.FILTERED_EVAL_SPLIT, reason))
        return kept, lost

    def own(self, rows: Sequence[Row]) -> dict[str, dict[str, np.ndarray]]:
        """doc_id -> vectors of the documents that were made from these clips, where the memory has them."""
        table = self.memory.rows([row_doc_id(row) for row in rows], ["text_embedding", "image_embedding"])
        text, image = (vectors_numpy(table[f"{n}_embedding"].combine_chunks()) for n in ("text", "image"))
        ids = table["doc_id"].to_pylist()
        return {doc: {"text": t, "image": i} for doc, t, i in zip(ids, text, image, strict=True)}

    def caption_vectors(
        self, rows: Sequence[Row], own: dict[str, dict[str, np.ndarray]]
    ) -> list[np.ndarray | None]:
        """Text vectors: the memory's where the clip is in it, else computed where that is wanted."""
        vectors: list[np.ndarray | None] = [own.get(row_doc_id(row), {}).get("text") for row in rows]
        wanted = self.config.vectors == "all" or self.config.retrieve.method.needs_vectors
        missing = [i for i, vector in enumerate(vectors) if vector is None and wanted]
        if missing:
            texts = [rows[i]["caption"] or "" for i in missing]
            for i, vector in zip(missing, self.clip.encode_texts(texts), strict=True):
                vectors[i] = vector
        return vectors


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
        found = self.found(payload, kept, rows) if self.joined else None
        matches, relevance = self.match(rows, targets, found)
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

    def found(self, payload: dict[str, Any], kept: Sequence[Row], rows: Sequence[Row]) -> list[np.ndarray]:
        """What the join found for these of the slice's rows."""
        from pipeline.prompts.augment.join import found

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
            for i in missing:
                vectors[i] = clip_picture_vector(rows[i], self.clip)
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


def clip_config(config: AugmentConfig, memory: Memory) -> ClipConfig:
    """The CLIP to load: the one that was asked for, else the one that the memory was built with."""
    return config.clip or store.clip_config(memory)


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
