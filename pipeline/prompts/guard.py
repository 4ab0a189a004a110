"""Excludes the clip, its source video, near-duplicates and evaluation items from retrieval.

    self         the same stretch of the same source
    sibling      another stretch of the same source video
    evaluation   listed in the exclusion file, or of an evaluation split
    duplicate    a re-encoded, resized, watermarked or mirrored copy: perceptual hashes within a bound
    similar      picture embeddings above a bound, measured on the memory (RA-CM3, section 3.2: 0.9)

The first reason in this order is the one that counts. Everything is arrays: one clip against its
candidates is a handful of vector operations.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from pydantic import Field, field_validator

from infra.config import Config, Incidental, Location
from pipeline.media.phash import NUM_BITS, mirror_mask, phash64
from pipeline.memory.vectors import cosines


class Verdict(IntEnum):
    """Why a document was refused to a clip; ALLOWED = it may be used."""

    ALLOWED = 0
    SELF = 1
    SIBLING = 2
    EVALUATION = 3
    DUPLICATE = 4
    SIMILAR = 5


EVALUATION_SPLITS = ("test", "val")
"""Values of the `split` column, in lower case, that are never retrieved nor made into prompts."""
RA_CM3 = 0.9
"""RA-CM3, section 3.2, and CM3Leon: what is more similar than this is skipped. With their CLIP."""
STRANGERS_FRAC = 1e-4
"""Share of the pairs of a sample that may lie above the bound. Ours, from `tests/bench/bench_guard.py`."""
MIN_DOCUMENTS = 150
"""With fewer there are not 1 / STRANGERS_FRAC different pairs to learn from: RA-CM3's bound is taken."""
LOWEST, HIGHEST = 0.85, 0.98
"""Whatever the memory says. On real clips and a small CLIP, strangers begin to be refused below the one
(`tests/bench/bench_guard.py`: precision 0.977 at 0.8, 0.991 at 0.85); copies encoded again stay above the
other."""


class GuardConfig(Config):
    """What counts as a leak."""

    max_hash_bits: int = Field(default=10, ge=-1, le=NUM_BITS)
    """Documents whose perceptual hash is within so many of 64 bits of the clip's, or of the mirrored clip's,
    are copies; -1 = don't compare. Ours (`tests/bench/bench_guard.py`): strangers are refused from 12 on."""
    max_similarity: float | None = Field(default=None, gt=0, le=1)
    """Cosine of the picture embeddings above which a document is refused; 1 = don't compare, None = as
    measured on the memory (`similarity_bound`), or RA-CM3's where it is too small for that."""
    exclude: Incidental[Location | None] = None
    """Evaluation exclusion file (.txt, .csv, .jsonl, .parquet): ids, hashes, source videos; see
    `pipeline/prompts/exclusion.py`. What it lists is neither retrieved nor made into a prompt."""
    source_pattern: str | None = None
    """Regular expression on `source_uri` whose first group names the source video, for corpora of
    ready-cut files: `([\\w-]{11})\\.\\d+\\.mp4$`. None = each file is a source of its own."""

    @field_validator("source_pattern")
    @classmethod
    def _pattern_names_a_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
            if not groups:
                raise ValueError("needs a group: (...) around the name of the source video")
        return value


@dataclass(frozen=True)
class GuardedDocuments:
    """What the guard knows of some documents: one row each."""

    shas: np.ndarray  # uint64 [n] key of source_sha256, 0 = unknown
    sources: np.ndarray  # uint64 [n] key of the source video's name, 0 = unknown
    start_s: np.ndarray  # float64 [n]
    end_s: np.ndarray  # float64 [n]
    phashes: np.ndarray  # uint64 [n] 0 = none, or a picture of one colour
    vectors: np.ndarray  # float [n d] unit picture embeddings; zero rows = none
    evaluation: np.ndarray  # bool [n] part of an evaluation set


@dataclass(frozen=True)
class GuardedClip:
    """What the guard knows of the clip that a prompt is made for."""

    sha: int
    source: int
    start_s: float
    end_s: float
    phashes: np.ndarray  # uint64 [m] of the clip's frames, 0 = none
    vector: np.ndarray | None  # float [d] unit picture embedding


CENTRE_CROPS = ((1.0, 0.5, 0.5), (0.9, 0.5, 0.5), (0.8, 0.5, 0.5), (0.7, 0.5, 0.5))
CROPS = (*CENTRE_CROPS, (0.8, 0.0, 0.0), (0.8, 0.0, 1.0), (0.8, 1.0, 0.0), (0.8, 1.0, 1.0))
"""(share of each side kept, place from top, place from left) under which a frame is hashed. Ours."""


def frame_hashes(frames: np.ndarray) -> tuple[int, ...]:
    """Perceptual hashes of a clip's frames, whole and cropped: what copies of it may look like.

    Args:
        frames: uint8 `t h w 3`.
    """
    hashes = []
    for keep, top, left in CROPS:
        height, width = (max(1, round(side * keep)) for side in frames.shape[1:3])
        y, x = round((frames.shape[1] - height) * top), round((frames.shape[2] - width) * left)
        hashes += [phash64(frame) for frame in frames[:, y : y + height, x : x + width]]
    return tuple(dict.fromkeys(hashes))


def judge(
    config: GuardConfig, clip: GuardedClip, documents: GuardedDocuments, candidates: np.ndarray
) -> np.ndarray:
    """The verdict on each candidate document for this clip.

    Args:
        config: the bounds.
        clip: the clip that the prompt is for.
        documents: the candidates among them.
        candidates: int [m] document numbers.

    Returns:
        int8 [m] `Verdict` values.
    """
    verdicts = np.full(len(candidates), Verdict.ALLOWED, np.int8)
    # From the weakest reason to the strongest: a later line overwrites an earlier one.
    verdicts[_similar(config, clip, documents, candidates)] = Verdict.SIMILAR
    verdicts[_copied(config, clip, documents, candidates)] = Verdict.DUPLICATE
    verdicts[documents.evaluation[candidates]] = Verdict.EVALUATION
    same = _same(documents.shas[candidates], clip.sha) | _same(documents.sources[candidates], clip.source)
    verdicts[same] = Verdict.SIBLING
    starts, ends = documents.start_s[candidates], documents.end_s[candidates]
    overlap = (starts < clip.end_s) & (clip.start_s < ends)
    picture = (starts == clip.start_s) & (ends == clip.end_s)
    verdicts[same & (overlap | picture)] = Verdict.SELF
    return verdicts


def _same(keys: np.ndarray, key: int) -> np.ndarray:
    return (keys == np.uint64(key)) & (keys != 0)


def _copied(
    config: GuardConfig, clip: GuardedClip, documents: GuardedDocuments, candidates: np.ndarray
) -> np.ndarray:
    own = clip.phashes[clip.phashes != 0]
    if config.max_hash_bits < 0 or not len(own):
        return np.zeros(len(candidates), bool)
    own = np.concatenate([own, own ^ np.uint64(mirror_mask())])
    theirs = documents.phashes[candidates]
    bits = np.bitwise_count(theirs[:, None] ^ own[None, :]).min(axis=1)
    return (bits <= config.max_hash_bits) & (theirs != 0)


def _similar(
    config: GuardConfig, clip: GuardedClip, documents: GuardedDocuments, candidates: np.ndarray
) -> np.ndarray:
    bound = RA_CM3 if config.max_similarity is None else config.max_similarity
    if clip.vector is None or bound >= 1:
        return np.zeros(len(candidates), bool)
    return cosines(documents.vectors[candidates], clip.vector) > bound


def count(verdicts: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Reason -> how many candidates it refused."""
    numbers = np.bincount(np.asarray(verdicts, np.int64), minlength=len(Verdict))
    return {v.name.lower(): int(numbers[v]) for v in Verdict if v and numbers[v]}


def similarity_bound(config: GuardConfig, sample: GuardedDocuments) -> float:
    """The cosine above which a document is refused as a copy, measured on the memory.

    A cosine of 0.9 means "nearly the same picture" to the CLIP of RA-CM3, "half of all the pictures of a
    kitchen" to a weaker encoder, and is hardly ever reached by a copy with a watermark in a third. What does
    carry over is how rare it is: copies are more alike than all but a few of the pairs of strangers that the
    memory itself is full of.

    Args:
        config: its `max_similarity`, if given, is the answer.
        sample: documents of the memory (`Memory.sample`), all pairs of which are looked at; pairs from one
            source, or from one file, don't count as strangers.

    Returns:
        A pure function of its arguments, in (0, 1].
    """
    if config.max_similarity is not None:
        return config.max_similarity
    if len(sample.sources) < MIN_DOCUMENTS:
        return RA_CM3
    found = []
    for n in range(len(sample.sources) - 1):
        strange = np.ones(len(sample.sources) - 1 - n, bool)
        for names in (sample.sources, sample.shas):  # 0 = unknown
            strange &= (names[n + 1 :] != names[n]) | (names[n] == 0)
        found.append(cosines(sample.vectors[n + 1 :][strange], sample.vectors[n]))
    values = np.concatenate(found)
    if len(values) < 1 / STRANGERS_FRAC:
        return RA_CM3
    bound = float(np.quantile(values, 1 - STRANGERS_FRAC, method="higher"))
    return round(min(max(bound, LOWEST), HIGHEST), 4)
