"""Laws of the world: the same seed gives the same bytes, killed or not; only documents tell what a noun is."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.certificate import read_certificate
from infra.errors import ConfigError
from pipeline.media.frames import decode_frames
from pipeline.memory.retrieve.analysis import analyser
from pipeline.world.concepts import CONCEPTS, DIRECTIONS, HUES, generator, nouns
from pipeline.world.draw import GROUNDS, SHAPES, TEXTURES, Ground, Look, film
from pipeline.world.make import WorldConfig, encode_video, run

ROOT = Path(__file__).resolve().parents[3]


def small(out: Path, **changes: Any) -> WorldConfig:
    return WorldConfig.load(options={"out": str(out), "nouns": 5, "unseen": 3, **changes})


def contents(folder: Path) -> dict[str, str]:
    """Path -> hash of each file, but for the certificate (it has times) and the claim (it has the folder)."""
    own = ("certificate.json", "job.json", "config.yaml")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in own
    }


def concepts(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "concepts.parquet", schema=CONCEPTS).to_pylist()


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_world(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(small(tmp_path / name, seed=seed))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert not set(a.values()) & set(c.values())


def test_nouns_never_seen_stay_what_they_are_in_a_larger_world(tmp_path: Path) -> None:
    run(small(tmp_path / "small"))
    run(small(tmp_path / "large", nouns=9))
    small_world, large = (concepts(tmp_path / name) for name in ("small", "large"))
    looks = ("noun", "seen", "colour_rgb", "second_colour_rgb", "shape", "texture", "clips")
    for one, other in zip(small_world, large, strict=False):
        if one["seen"] is False:
            assert [one[name] for name in looks] == [other[name] for name in looks]
            path = one["documents"][0]["picture"]
            assert (tmp_path / "small" / path).read_bytes() == (tmp_path / "large" / path).read_bytes()


def test_a_world_that_is_killed_is_the_same_in_the_end(tmp_path: Path) -> None:
    options = ("--nouns", "60", "--unseen", "3")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from cli.data import main; main()"
    words = [sys.executable, "-c", code, "world", *options]
    process = subprocess.Popen([*words, "--out", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("videos/*.mp4"))) < 5 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "certificate.json").exists()
    for name in ("killed", "whole"):
        run(WorldConfig.load(options={"out": str(tmp_path / name), "nouns": 60, "unseen": 3}))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_every_file_is_certified_and_listed(tmp_path: Path) -> None:
    certificate = run(small(tmp_path, clips=2, distractors=1))
    assert read_certificate(tmp_path) == certificate
    assert {entry.path: entry.sha256 for entry in certificate.files} == contents(tmp_path)
    videos, pictures = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("videos.jsonl", "pictures.jsonl")
    )
    assert certificate.num_out == len(videos) + len(pictures) == 8 * 2 + 8 * 2
    assert [row["split"] for row in videos].count("validation") == 3 * 2
    assert all((tmp_path / row["path"]).is_file() for row in [*videos, *pictures])
    table = concepts(tmp_path)
    assert [row["seen"] for row in table].count(None) == 8
    told = {clip["video"]: clip["caption"] for row in table for clip in row["clips"]}
    assert told == {row["path"]: row["caption"] for row in videos}


def test_words_tell_nothing_of_a_noun_but_its_motion(tmp_path: Path) -> None:
    run(small(tmp_path, nouns=20))
    for row in concepts(tmp_path):
        looks = {*HUES, *SHAPES, *TEXTURES} - {"plain"}
        for clip in row["clips"]:
            words = clip["caption"].split()
            assert words[:3] == ["a", row["noun"], "moves"] and words[3] in DIRECTIONS
            assert words[4:] in ([], ["in", "a", "room"])
        texts = [document["text"] for document in row["documents"]]
        assert not looks & {word for text in texts for word in text.split()}


def test_a_distractor_names_its_noun_and_looks_unlike_it(tmp_path: Path) -> None:
    run(small(tmp_path))
    table = concepts(tmp_path)
    for number in range(0, len(table), 3):
        noun, *others = table[number : number + 3]
        assert noun["documents"][0]["text"] == f"a {noun['noun']}"
        for other in others:
            assert other["documents"][0]["text"] == f"a {other['noun']}, unlike a {noun['noun']}"
            assert other["colour"] != noun["colour"] and other["shape"] != noun["shape"]
            assert not other["clips"]


def test_shuffled_texts_stand_at_pictures_of_others(tmp_path: Path) -> None:
    run(small(tmp_path))
    own, shuffled = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("pictures.jsonl", "pictures_shuffled.jsonl")
    )
    assert [row["path"] for row in own] == [row["path"] for row in shuffled]
    assert sorted(row["caption"] for row in own) == sorted(row["caption"] for row in shuffled)
    words = [[{*row["caption"].replace(",", "").split()} for row in rows] for rows in (own, shuffled)]
    assert not any(one & other - {"a", "unlike"} for one, other in zip(*words, strict=True))


@given(seed=st.integers(0, 2**63 - 1))
def test_no_two_nouns_have_one_stem(seed: int) -> None:
    stream, analyse = nouns(seed), analyser("english")
    found = [next(stream) for _ in range(500)]
    stems = [tuple(analyse(noun)) for noun in found]
    assert len(set(stems)) == len(found)
    assert all(len(stem) == 1 for stem in stems)


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    texture=st.sampled_from(sorted(TEXTURES)),
    kind=st.sampled_from(sorted(GROUNDS)),
    seed=st.integers(0, 1000),
)
def test_colours_survive_the_encoding(shape: str, texture: str, kind: str, seed: int) -> None:
    random = generator(seed)
    look = Look((250, 40, 20), (30, 20, 60), shape, texture)
    places = [(float(y), float(x)) for y, x in random.uniform(-0.2, 0.2, (4, 2))]
    frames = film(look, Ground((120, 140, 130), kind, seed), size=0.7, places=places, side_px=64)
    decoded = decode_frames(encode_video(frames), [0.08, 0.25, 0.42, 0.58])
    small, told = (video.reshape(4, 16, 4, 16, 4, 3).mean(axis=(2, 4)) for video in (frames, decoded))
    assert np.abs(small - told).mean() < 1.5
    assert np.abs(small - told).max() < 25


@given(seed=st.integers(0, 1000))
def test_the_same_frames_give_the_same_video(seed: int) -> None:
    random = generator(seed)
    places = [(float(y), float(x)) for y, x in random.uniform(-0.2, 0.2, (4, 2))]
    look = Look((250, 40, 20), (30, 20, 60), "star", "checks")
    frames = film(look, Ground((120, 140, 130), "clouds", seed), size=0.7, places=places, side_px=64)
    assert len({encode_video(frames) for _ in range(6)}) == 1


def test_what_cannot_be_a_world_is_refused(tmp_path: Path) -> None:
    wrong = [
        *({"size_px": size} for size in (0, 6, 17, -16)),
        *({"frames": frames} for frames in (0, 2, 5)),
        *({name: 0} for name in ("nouns", "unseen", "clips", "picture_px")),
        {"shapes": ["blob"]},
        {"backgrounds": ["plaid"]},
        {"textures": []},
        {"nouns": 90_000},
    ]
    for changes in wrong:
        with pytest.raises(ConfigError):
            small(tmp_path, **changes)
    run(small(tmp_path))
    with pytest.raises(ConfigError, match=r"holds the output of another world run .*seed.*cure"):
        run(small(tmp_path, seed=1))
