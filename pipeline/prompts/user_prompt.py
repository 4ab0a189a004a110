"""Retrieves for a user's own prompt what `augment` would have stored for the same caption.

    memory ── once ──▶ its shards, open          texts ──▶ search ─▶ guard ─▶ choose ──▶ segments

A prompt has no source, so the guard knows no clip, sibling or copy of it; what belongs to an evaluation split,
or is listed as one, stays out of reach as in training. One machine, no Ray.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from infra.clip import Clip, ClipConfig, check_clip, load_clip
from infra.config import Config, Incidental, Location
from infra.errors import ConfigError
from pipeline.memory import Memory, open_memory
from pipeline.memory.retrieve import RetrieveConfig
from pipeline.memory.search import check_model, load_memory_clip
from pipeline.prompts.augment.match import Matcher, document_segments, shown
from pipeline.prompts.exclusion import Exclusion, read_exclusion
from pipeline.prompts.guard import GuardConfig
from pipeline.schema import CLIPS, SEGMENT, Role

WORDS_ALONE = dict.fromkeys(CLIPS.names)
"""The row of a clip of which nothing but its caption is known."""


class UserRetrievalConfig(Config):
    """Where the documents of a user's own prompts come from."""

    memory: Incidental[Location | None] = None
    """Folder made by `vimi-data build-index`: prompts in words get documents from it, as training had them;
    null = none."""
    memory_version: str | None = None
    """Tag of an older version of the memory; null = the one that is certified."""
    retrieve: RetrieveConfig = RetrieveConfig()
    """As `vimi-data augment` had it for the run's prompts; `num_documents` says how many of the k are used."""
    clip: Incidental[ClipConfig | None] = None
    """The memory's CLIP, where its weights lie elsewhere; null = by name. Loaded only where the retriever
    compares vectors."""
    guard: GuardConfig = GuardConfig()
    """As `vimi-data augment` had it: evaluation items stay out of reach, and of pictures that are alike only
    the best is shown. A prompt in words is nobody's copy or sibling."""


class PromptRetriever:
    """Texts -> rows of PROMPTS without a target: their documents and themselves, as augment stores them.

    Args:
        memory: an open memory.
        retrieve: how a text finds its documents.
        clip: the memory's own; needed where the retriever compares vectors.
        guard: as augment had it.
        listed: what stays out of reach beside what the guard's file lists.

    Raises:
        ConfigError: a CLIP is missing or is not the memory's.
    """

    def __init__(
        self,
        memory: Memory,
        retrieve: RetrieveConfig,
        clip: Clip | None = None,
        *,
        guard: GuardConfig = GuardConfig(),
        listed: Exclusion = Exclusion(),
    ) -> None:
        check_model(memory, retrieve, clip)
        self.memory, self.retrieve, self.clip = memory, retrieve, clip
        if guard.exclude is not None:
            listed |= read_exclusion(guard.exclude, source_pattern=guard.source_pattern)
        self.matcher = Matcher(memory, retrieve, guard, listed, kept=len(memory.shards))

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each text: caption, segments, num_documents, memory_version, model_hash."""
        vectors = None
        if self.clip is not None and self.retrieve.method.needs_vectors:
            vectors = self.clip.encode_texts(list(texts))
        matches = self.matcher.match(
            [WORDS_ALONE | {"caption": text} for text in texts],
            phashes=[()] * len(texts),
            pictures=[None] * len(texts),
            captions=[None] * len(texts) if vectors is None else list(vectors),
            queries=vectors,
        )
        documents = shown(self.memory, matches)
        segments = [
            [
                *document_segments(match, documents, self.retrieve.retriever),
                {"type": "text", "role": Role.CAPTION.value, "text": text},
            ]
            for text, match in zip(texts, matches, strict=True)
        ]
        stored = pa.array(segments, pa.list_(SEGMENT)).to_pylist()  # each column, as read from a shard
        return [
            {
                "caption": text,
                "segments": own,
                "num_documents": len(match.docs),
                "memory_version": self.memory.version,
                "model_hash": self.memory.model_hash,
            }
            for text, match, own in zip(texts, matches, stored, strict=True)
        ]


def check_retrieval(config: UserRetrievalConfig) -> Memory | None:
    """Open the memory that the config names; None where it names none.

    Raises:
        ConfigError: no memory there, or a CLIP that is missing; options of a retrieval without a memory.
    """
    if config.memory is None:
        given = {"memory_version", "retrieve", "guard", "clip"} & config.model_fields_set
        if given:
            raise ConfigError(
                f"{', '.join(sorted(given))} without a memory", cure="give --memory, a folder of build-index"
            )
        return None
    memory = open_memory(config.memory, version=config.memory_version)
    if config.clip is not None and config.retrieve.method.needs_vectors:
        check_clip(config.clip)
    return memory


def open_retriever(
    config: UserRetrievalConfig, memory: Memory, listed: Exclusion = Exclusion()
) -> PromptRetriever:
    """The retriever that the config describes, ready to answer; it never gives what is `listed`.

    Raises:
        ConfigError: another CLIP than the memory's, or one that can't be loaded.
    """
    clip = None
    if config.retrieve.method.needs_vectors:
        clip = load_memory_clip(memory) if config.clip is None else load_clip(config.clip)
    return PromptRetriever(memory, config.retrieve, clip, guard=config.guard, listed=listed)
