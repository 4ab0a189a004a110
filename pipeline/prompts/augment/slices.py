"""What every worker of augment opens, and which rows of a slice it reads."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from infra.allocator import keep_freed_memory
from infra.clip import Clip, ClipConfig, load_clip
from pipeline.memory import Memory, open_memory, require_model, store
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.vectors import vectors_numpy
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.facts import excluded
from pipeline.prompts.augment.target import Row
from pipeline.prompts.exclusion import Exclusion, read_exclusion
from pipeline.schema import CLIPS, Status
from pipeline.shards import read_slice, rejected_row


class Retrieving:
    """What every worker of the job needs; opened and loaded when first asked for, and kept."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    @cached_property
    def memory(self) -> Memory:
        """The job has read it through (`job.check`, `join.check_units`)."""
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
        keep_freed_memory()
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


def clip_config(config: AugmentConfig, memory: Memory) -> ClipConfig:
    """The CLIP to load: the one that was asked for, else the one that the memory was built with."""
    return config.clip or store.clip_config(memory)


def good_rows(uri: str, start: int, rows: int) -> list[Row]:
    """The usable ones of rows [start, start + rows) of a part."""
    table = read_slice(uri, start, rows, CLIPS.names)
    return [row for row in table.to_pylist() if row["status"] == Status.OK]


def has_caption(row: Row) -> bool:
    return bool((row["caption"] or "").strip())
