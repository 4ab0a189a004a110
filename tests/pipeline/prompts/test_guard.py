"""The guard: no prompt ever holds its own clip, a sibling, a copy, or a piece of the exam."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import ConfigError
from pipeline.media.phash import mirror_mask, phash64
from pipeline.prompts.exclusion import Exclusion, key, read_exclusion, source_name
from pipeline.prompts.guard import (
    MIN_DOCUMENTS,
    RA_CM3,
    GuardConfig,
    GuardedClip,
    GuardedDocuments,
    Verdict,
    count,
    frame_hashes,
    judge,
    similarity_bound,
)

DIM = 6


def drawn(random: np.random.Generator, documents: int) -> tuple[GuardedClip, GuardedDocuments]:
    """A clip and documents that collide in every way, often."""
    centre = random.normal(size=DIM)
    vectors = centre + random.choice([0.05, 0.5, 5.0], (documents, 1)) * random.normal(size=(documents, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    base = int(random.integers(1, 1 << 63))
    flips = [
        sum(1 << int(b) for b in set(random.integers(0, 64, random.integers(0, 20))))
        ^ (mirror_mask() if random.random() < 0.5 else 0)
        for _ in range(documents)
    ]
    start = random.integers(0, 4, documents).astype(float)
    known = GuardedDocuments(
        shas=random.integers(0, 5, documents).astype(np.uint64),
        sources=random.integers(0, 5, documents).astype(np.uint64),
        start_s=start,
        end_s=start + random.integers(0, 3, documents),
        phashes=np.array([base ^ flip for flip in flips], np.uint64),
        vectors=vectors.astype(np.float16),
        evaluation=random.random(documents) < 0.1,
    )
    begin = float(random.integers(0, 4))
    clip = GuardedClip(
        sha=int(random.integers(0, 5)),
        source=int(random.integers(0, 5)),
        start_s=begin,
        end_s=begin + float(random.integers(0, 3)),
        phashes=np.array([base, 0], np.uint64),
        vector=centre / np.linalg.norm(centre),
    )
    return clip, known


def leaks(config: GuardConfig, clip: GuardedClip, known: GuardedDocuments, doc: int) -> bool:
    """The law, from scratch, one document at a time, in plain Python."""
    if clip.sha and int(known.shas[doc]) == clip.sha:
        return True
    if clip.source and int(known.sources[doc]) == clip.source:
        return True
    if known.evaluation[doc]:
        return True
    theirs = int(known.phashes[doc])
    for own in (int(h) for h in clip.phashes):
        for hashed in (own, own ^ mirror_mask()):
            if own and theirs and (theirs ^ hashed).bit_count() <= config.max_hash_bits:
                return True
    assert clip.vector is not None
    pairs = zip(known.vectors[doc], clip.vector, strict=True)
    similarity = sum(float(a) * float(np.float32(b)) for a, b in pairs)
    assert config.max_similarity is not None
    return config.max_similarity < 1 and similarity > config.max_similarity


@pytest.mark.parametrize("seed", range(4))
def test_no_leak_in_a_hundred_thousand_draws(seed: int) -> None:
    """4 x 250 clips x 100 candidates: what is allowed never breaks the law, what is refused does."""
    random = np.random.default_rng(seed)
    for _ in range(250):
        config = GuardConfig(
            max_hash_bits=int(random.integers(-1, 16)),
            max_similarity=float(random.choice([0.8, 0.9, 1.0])),
        )
        clip, known = drawn(random, 100)
        verdicts = judge(config, clip, known, np.arange(100))
        expected = [leaks(config, clip, known, doc) for doc in range(100)]
        assert (verdicts != Verdict.ALLOWED).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_verdict_is_the_strongest_reason_and_does_not_depend_on_the_company(seed: int) -> None:
    clip, known = drawn(np.random.default_rng(seed), 30)
    together = judge(GuardConfig(), clip, known, np.arange(30))
    alone = [int(judge(GuardConfig(), clip, known, np.array([doc]))[0]) for doc in range(30)]
    assert together.tolist() == alone
    assert sum(count(together).values()) == int((together != 0).sum())
    for doc, verdict in enumerate(together):
        same = (clip.sha and known.shas[doc] == clip.sha) or (clip.source and known.sources[doc] == clip.source)
        assert (verdict in (Verdict.SELF, Verdict.SIBLING)) == bool(same)


def test_the_same_stretch_is_self_and_another_is_a_sibling() -> None:
    clip = GuardedClip(7, 0, 2.0, 4.0, np.zeros(1, np.uint64), None)
    known = GuardedDocuments(
        shas=np.array([7, 7, 7, 8], np.uint64),
        sources=np.zeros(4, np.uint64),
        start_s=np.array([2.0, 3.0, 4.0, 2.0]),
        end_s=np.array([4.0, 5.0, 6.0, 4.0]),
        phashes=np.zeros(4, np.uint64),
        vectors=np.zeros((4, DIM)),
        evaluation=np.zeros(4, bool),
    )
    found = judge(GuardConfig(), clip, known, np.arange(4))
    assert found.tolist() == [Verdict.SELF, Verdict.SELF, Verdict.SIBLING, Verdict.ALLOWED]


def test_unknown_sources_and_pictures_of_one_colour_match_nothing() -> None:
    clip = GuardedClip(0, 0, 0.0, 1.0, np.zeros(3, np.uint64), None)
    zeros = np.zeros(2, np.uint64)
    known = GuardedDocuments(zeros, zeros, np.zeros(2), np.ones(2), zeros, np.zeros((2, DIM)), zeros != 0)
    assert (judge(GuardConfig(), clip, known, np.arange(2)) == Verdict.ALLOWED).all()


def test_the_mirrored_picture_is_a_copy() -> None:
    random = np.random.default_rng(0)
    small = random.integers(0, 255, (6, 9, 3)).astype(np.float32)
    picture = np.kron(small, np.ones((16, 16, 1))).astype(np.uint8)
    distance = (phash64(picture) ^ mirror_mask() ^ phash64(picture[:, ::-1])).bit_count()
    assert distance <= GuardConfig().max_hash_bits
    assert (phash64(picture) ^ phash64(picture[:, ::-1])).bit_count() > 20


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("https://www.youtube.com/watch?v=GTPU6RnGj68&t=4", "GTPU6RnGj68"),
        ("https://youtu.be/GTPU6RnGj68?si=x", "GTPU6RnGj68"),
        ("http://m.youtube.com/embed/GTPU6RnGj68", "GTPU6RnGj68"),
        ("file:///data/a.mp4", "/data/a.mp4"),
        ("https://Example.org/a.mp4#t=3", "example.org/a.mp4"),
        ("https://example.org/get?id=4", "example.org/get?id=4"),
    ],
)
def test_all_addresses_of_a_video_have_one_name(uri: str, name: str) -> None:
    assert source_name(uri) == name


def test_ready_cut_files_are_siblings_by_pattern() -> None:
    pattern = GuardConfig(source_pattern=r"([\w-]{11})\.\d+\.mp4$").source_pattern
    assert source_name("/x/clips/GTPU6RnGj68.61.mp4", pattern) == "GTPU6RnGj68"
    assert source_name("https://youtu.be/GTPU6RnGj68", pattern) == "GTPU6RnGj68"
    for wrong in ("no group", "(unbalanced"):
        with pytest.raises(ValidationError):
            GuardConfig(source_pattern=wrong)


SHA, ID = "ab" * 32, "0123456789abcdef01234567"
ROWS: list[dict[str, Any]] = [
    {"clip_id": ID, "sha256": None, "source": "/data/a.mp4", "phash": None},
    {"clip_id": None, "sha256": SHA, "source": "https://youtu.be/GTPU6RnGj68", "phash": 255},
]


def test_every_exclusion_format_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    lines = [",".join(["" if v is None else str(v) for v in row.values()]) for row in ROWS]
    (tmp_path / "e.csv").write_text("\n".join(["clip_id,sha256,source,phash", *lines]).replace(",255", ",ff"))
    expected = Exclusion(frozenset({ID}), frozenset({SHA}), frozenset({"/data/a.mp4", "GTPU6RnGj68"}), (255,))
    for name in ("e.jsonl", "e.parquet", "e.csv"):
        assert read_exclusion(str(tmp_path / name)) == expected
    (tmp_path / "e.txt").write_text(
        f"# the exam\n{ID}\n{SHA}  # a hash\n/data/a.mp4\n\nhttps://youtu.be/GTPU6RnGj68\n"
    )
    assert read_exclusion(str(tmp_path / "e.txt")) == Exclusion(expected.ids, expected.hashes, expected.sources)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("e.csv", "title\nx\n", "has the columns title"),
        ("e.jsonl", "not json", "can't read"),
        ("e.jsonl", "[1]", "can't read"),
        ("e.parquet", "not parquet", "can't read"),
        ("e.xls", "", "legal: .txt, .csv"),
        ("e.jsonl", '{"phash": "zz"}', "16 hex digits"),
    ],
)
def test_a_wrong_exclusion_file_is_refused_in_one_line(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_exclusion(str(tmp_path / name))
    with pytest.raises(ConfigError, match="no exclusion file"):
        read_exclusion(str(tmp_path / "absent.csv"))


def test_keys_are_never_zero_for_something() -> None:
    assert key(None) == key("") == 0
    assert key("a") != key("b") != 0


def test_a_copy_that_is_cropped_mirrored_or_trimmed_is_known_by_the_frames_of_the_clip() -> None:
    """The memory holds one hash, of the copy's middle frame; the clip brings many."""
    random = np.random.default_rng(3)
    scene = np.kron(random.integers(0, 255, (12, 30, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    frames = np.stack([scene[:, 12 * t : 12 * t + 256] for t in range(16)])  # a slow pan
    clip = GuardedClip(0, 0, 0.0, 1.0, np.array(frame_hashes(frames), np.uint64), None)
    copies = {
        "trimmed": frames[11],
        "cropped": frames[8, 15:-15, 20:-20],
        "cropped in a corner": frames[8, : round(192 * 0.8), : round(256 * 0.8)],
        "mirrored and cropped": frames[8, 9:-9, 12:-12][:, ::-1],
    }
    stranger = np.kron(random.integers(0, 255, (12, 16, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    for name, picture in copies.items():
        known = pictured([phash64(picture), phash64(stranger)])
        found = judge(GuardConfig(), clip, known, np.arange(2))
        assert found.tolist() == [Verdict.DUPLICATE, Verdict.ALLOWED], name


def pictured(phashes: list[int]) -> GuardedDocuments:
    """Documents of unknown source, known by their pictures alone."""
    none, number = np.zeros(len(phashes), np.uint64), len(phashes)
    return GuardedDocuments(
        shas=none,
        sources=none,
        start_s=np.zeros(number),
        end_s=np.ones(number),
        phashes=np.array(phashes, np.uint64),
        vectors=np.zeros((number, 2)),
        evaluation=none != 0,
    )


def memory_of(spread: float, *, count: int = 600, copies: int = 20, seed: int = 0) -> GuardedDocuments:
    """Strangers around one direction (the less `spread`, the more alike), and near copies of the first."""
    random = np.random.default_rng(seed)
    strangers = np.eye(64)[0] + spread * random.normal(size=(count, 64)) / 8
    again = strangers[:copies] + 0.02 * random.normal(size=(copies, 64)) / 8
    vectors = np.concatenate([strangers, again])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    n = len(vectors)
    return GuardedDocuments(
        shas=np.arange(1, n + 1).astype(np.uint64),
        sources=np.r_[np.arange(1, count + 1), np.arange(1, copies + 1)].astype(np.uint64),
        start_s=np.zeros(n),
        end_s=np.ones(n),
        phashes=np.zeros(n, np.uint64),
        vectors=vectors.astype(np.float16),
        evaluation=np.zeros(n, bool),
    )


@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
def test_the_measured_bound_parts_copies_from_strangers_whatever_the_encoder(spread: float) -> None:
    """A narrow encoder's strangers are closer than a wide one's copies: one number can't serve both."""
    known = memory_of(spread)
    bound = similarity_bound(GuardConfig(), known)
    vectors = known.vectors.astype(np.float32)
    between = vectors[:600] @ vectors[:600].T
    assert (between[~np.eye(600, dtype=bool)] > bound).mean() < 1e-3
    assert ((vectors[:20] * vectors[600:]).sum(1) > bound).all()
    assert similarity_bound(GuardConfig(max_similarity=0.7), known) == 0.7


def test_a_memory_too_small_to_measure_gets_the_published_bound() -> None:
    assert similarity_bound(GuardConfig(), memory_of(0.2, count=MIN_DOCUMENTS - 30)) == RA_CM3
