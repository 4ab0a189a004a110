"""What a worker has at hand: the memory's arrays, the matcher, the CLIP; each made when first needed."""

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np

from infra.claim import JOB_FILE
from infra.clip import Clip, ClipConfig, load_clip
from infra.storage import join, read_json
from pipeline.media.isolate import Isolated, IsolatedCrashError, IsolatedTimeoutError
from pipeline.memory import Memory, open_memory, require_model
from pipeline.memory.retrieve.documents import Documents, load_documents
from pipeline.memory.retrieve.join import open_search
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.match import Match, Matcher, excluded, guarded_documents, own_documents
from pipeline.prompts.augment.target import Row, Target, try_target
from pipeline.prompts.guard.calibrate import similarity_bound
from pipeline.prompts.guard.exclusion import Exclusion, read_exclusion
from pipeline.schema import RowError, Status, TargetKind
from pipeline.shards import rejected_row


@lru_cache(maxsize=1)
def workbench(config: str) -> "Workbench":
    """Ray gives a process many tasks: the memory's arrays and the CLIP are loaded for the first."""
    return Workbench(AugmentConfig.model_validate_json(config))


class Workbench:
    """All that turns rows into matches and targets, for one config."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    @cached_property
    def memory(self) -> Memory:
        return open_memory(self.config.memory, version=self.config.memory_version)

    @cached_property
    def documents(self) -> Documents:
        return load_documents(self.memory, k1=self.config.retrieve.k1, b=self.config.retrieve.b)

    @cached_property
    def exclusion(self) -> Exclusion:
        guard = self.config.guard
        if guard.exclude is None:
            return Exclusion()
        return read_exclusion(guard.exclude, source_pattern=guard.source_pattern)

    @cached_property
    def decoder(self) -> Isolated:
        return Isolated(timeout_s=self.config.timeout_s, memory_bytes=self.config.memory_bytes)

    @cached_property
    def clip(self) -> Clip:
        clip = load_clip(clip_config(self.config, self.memory))
        require_model(self.memory, clip.model_hash, name=clip.name)
        return clip

    @cached_property
    def matcher(self) -> Matcher:
        guard = self.config.guard
        guarded = guarded_documents(self.documents, guard, self.exclusion)
        guard = guard.model_copy(update={"max_similarity": similarity_bound(guard, guarded)})
        search = open_search(self.config.retrieve, self.documents, self.memory)
        return Matcher(self.config.retrieve, guard, self.documents, guarded, search, self.config.seed)

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
            made = self._target(row)
            if isinstance(made, Target):
                kept.append(row)
                targets.append(made)
            else:
                failed.append(rejected_row(row, *made))
        return kept, targets, failed

    def _target(self, row: Row) -> Target | tuple[Status, str]:
        """The row's target, or its fate; a decoder that hangs or crashes costs this row alone."""
        if self.config.target.kind == TargetKind.REFERENCE:
            return try_target(row, self.config.target)
        try:
            return self.decoder.call("pipeline.prompts.augment.target:try_target", row, self.config.target)
        except IsolatedTimeoutError as error:
            return Status.TIMEOUT, str(error)
        except IsolatedCrashError as error:
            return Status.CRASHED, str(error)
        except MemoryError:
            return Status.TOO_LARGE, f"needs more than {self.config.memory_bytes:,} bytes"

    def match(self, rows: list[Row], targets: list[Target]) -> list[Match]:
        if not rows or not self.config.retrieve.k:
            return [Match() for _ in rows]
        own = own_documents(rows, self.documents)
        captions = self._caption_vectors(rows, own)
        return self.matcher.match(
            rows,
            phashes=[target.phashes for target in targets],
            pictures=self._picture_vectors(rows, own),
            captions=captions,
            queries=self._query_vectors(rows, captions),
        )

    def _caption_vectors(self, rows: list[Row], own: np.ndarray) -> list[np.ndarray | None]:
        """Text vectors: the memory's where the clip is in it, else computed where that is wanted."""
        vectors: list[np.ndarray | None] = [self.documents.text[i] if i >= 0 else None for i in own]
        wanted = self.config.vectors == "all" or self.config.retrieve.retriever != "bm25"
        missing = [i for i, vector in enumerate(vectors) if vector is None and wanted]
        if missing:
            texts = [rows[i]["caption"] or "" for i in missing]
            for i, vector in zip(missing, self.clip.encode_texts(texts), strict=True):
                vectors[i] = vector
        return vectors

    def _query_vectors(self, rows: list[Row], captions: Sequence[np.ndarray | None]) -> np.ndarray | None:
        if self.config.retrieve.retriever == "bm25":
            return None
        if self.config.retrieve.query_dropout_frac:
            return self.clip.encode_texts(self.matcher.queries(rows))
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


def clip_config(config: AugmentConfig, memory: Memory) -> ClipConfig:
    """The CLIP to load: the one that was asked for, else the one that the memory was built with."""
    if config.clip is not None:
        return config.clip
    return ClipConfig.model_validate(read_json(join(memory.uri, JOB_FILE))["config"]["clip"])


def clip_picture_vector(row: Row, clip: Clip) -> np.ndarray | None:
    """The unit image vector of a clip as `build-index` would make it; None if it can't be read."""
    from pipeline.memory.embed.pictures import EmbedConfig, read_picture
    from pipeline.memory.embed.worker import frame_mean

    try:
        picture = read_picture(row, EmbedConfig(), clip.preprocessing)
    except RowError:
        return None
    return frame_mean(clip.encode_pixels(picture.pixels), [len(picture.pixels)])[0]
