"""Augment: every caption gets honest examples, in order, as shards that are the same every time."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.certificate import Certificate
from infra.errors import ConfigError, DataError
from pipeline.memory import open_memory
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.vectors import unit, vectors_numpy
from pipeline.prompts.augment import AugmentConfig, check, join, run
from pipeline.prompts.augment.match import Match
from pipeline.prompts.augment.relevance import measure, random_documents, sentences, total
from pipeline.report.validate import ValidateConfig, validate
from pipeline.schema import PROMPTS, check_table
from tests.pipeline.prompts.augment.jobs import config, contents, read

pytestmark = pytest.mark.ray
REFERENCE = {"kind": "reference"}
"""A target of which nothing is decoded."""


@pytest.fixture(scope="module")
def made(world: Any, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Certificate]:
    out = tmp_path_factory.mktemp("made")
    return out, run(config(world, out))


def test_every_good_clip_becomes_one_prompt(world: Any, made: tuple[Path, Certificate]) -> None:
    out, certificate = made
    rows = read(out)
    assert certificate.num_in == certificate.num_out == len(world.rows) == len(rows)
    assert [row["clip_id"] for row in rows] == [row["clip_id"] for row in world.rows]
    for file in certificate.files:
        if file.path.startswith("part-"):
            check_table(pq.read_schema(out / file.path), PROMPTS, file.path)


def test_segments_are_text_then_picture_by_rank_and_the_caption_last(made: tuple[Path, Certificate]) -> None:
    for row in read(made[0]):
        *retrieved, last = row["segments"]
        assert (last["type"], last["role"], last["text"]) == ("text", "caption", row["caption"])
        assert [s["type"] for s in retrieved] == ["text", "image"] * row["num_documents"]
        assert [s["document"]["rank"] for s in retrieved] == [
            rank for rank in range(1, row["num_documents"] + 1) for _ in "ti"
        ]
        scores = [s["document"]["score"] for s in retrieved]
        assert scores == sorted(scores, reverse=True)
        assert all(s["image"][:2] == b"\xff\xd8" for s in retrieved if s["type"] == "image")
        assert all(s["document"]["clip_similarity"] is not None for s in retrieved)


def test_no_prompt_holds_its_own_source_video(made: tuple[Path, Certificate]) -> None:
    out, certificate = made
    for row in read(out):
        for segment in row["segments"][:-1]:
            assert segment["document"]["source_sha256"] != row["source_sha256"]
    assert certificate.facts["refused"]["self"] == certificate.num_out
    assert certificate.facts["refused"]["sibling"] > 0


def test_target_frames_have_the_training_size(made: tuple[Path, Certificate]) -> None:
    for row in read(made[0]):
        target = row["target"]
        frames = np.frombuffer(target["data"], np.uint8).reshape(
            target["num_frames"], target["height_px"], target["width_px"], 3
        )
        assert frames.shape == (16, 36, 64, 3)
        assert frames.std() > 10
        assert target["fps"] == 16.0  # one second: too short for 16 frames at 6 fps
        assert (row["fps"], row["height_px"], row["width_px"]) == (10.0, 96, 128)


def test_certificate_says_whether_documents_tell_anything_of_their_targets(
    world: Any, made: tuple[Path, Certificate]
) -> None:
    """Captions of few nouns share words; this world's picture vectors are drawn, so no picture tells."""
    facts = made[1].facts
    found = facts["relevance"]
    assert found["words"] > found["words_best"] > 1.2 * found["words_random"] > 0
    assert found["pictures"] == made[1].num_out and abs(found["lead"] / found["pictures"]) < 0.1
    words, pictures = facts["remarks"]
    assert words.startswith("words: the best document has ")
    assert pictures.endswith("24 clips): no nearer: retrieval can hardly help")


def test_documents_that_look_like_their_targets_are_told_from_random_ones(world: Any) -> None:
    memory = open_memory(world.memory)
    count = memory.num_documents
    rows = [row | {"caption": "Dogs on the GUITAR"} for row in world.rows]
    matches = [Match(docs=[n]) for n in range(count)]
    table = memory.take(range(count), ["text", "image_embedding"])
    image = vectors_numpy(table["image_embedding"].combine_chunks())
    near = [unit(image[n] + image[n - 1]) for n in range(count)]
    parts = [slice(at, at + 5) for at in range(0, 24, 5)]
    sums = total([measure(rows[p], matches[p], near[p], memory) for p in parts])
    stems = {"dog", "guitar"}
    assert sums["words"] == 2 * count
    texts = table["text"].to_pylist()
    assert sums["words_best"] == sum(len(stems & set(text.lower().split())) for text in texts)
    assert sentences(sums)[1].endswith("24 clips): nearer than a random one") and sums["best"] / 24 > 0.6
    assert "not compared" in sentences(sums | {"pictures": 0})[1]
    assert sentences(measure(rows, [Match() for _ in rows], near, memory)) == []


def test_random_documents_are_two_of_all() -> None:
    drawn = [random_documents(f"clip {n}", 5) for n in range(200)]
    assert {first for first, _ in drawn} == set(range(5)) == {second for _, second in drawn}
    assert all(first != second for first, second in drawn)


@pytest.mark.parametrize("retriever", ["bm25", "hybrid"])
def test_the_number_of_shards_does_not_change_a_byte(
    world: Any, ray_cluster: None, tmp_path: Path, retriever: str
) -> None:
    """One shard is searched by the worker that writes; several by the join."""
    made = {}
    retrieve = {"retriever": retriever, "k": 4, "depth": 5}  # so shallow that the guard asks for more
    for shard_rows in (1000, 4, 1):
        memory = world.write_memory(tmp_path / f"memory-{shard_rows}", world.rows, shard_rows=shard_rows)
        out = tmp_path / f"out-{shard_rows}"
        run(config(world, out, memory=memory, target=REFERENCE, retrieve=retrieve, shard_rows=1))
        made[shard_rows] = contents(out)
        assert not (out / "join").exists()
    assert len(open_memory(str(tmp_path / "memory-1")).shards) == len(world.rows)
    assert made[1000] == made[4] == made[1]


def test_a_damaged_shard_is_refused_before_anything_is_made(
    world: Any, ray_cluster: None, tmp_path: Path
) -> None:
    memory = world.write_memory(tmp_path / "memory", world.rows, shard_rows=8)
    file = tmp_path / "memory" / "shards" / "00001" / "postings.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"postings.arrow is not the file that was certified") as error:
        run(config(world, tmp_path / "out", memory=memory))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_number_of_workers_does_not_change_a_byte(
    world: Any, made: tuple[Path, Certificate], tmp_path: Path
) -> None:
    for workers in (1, 8):
        out = tmp_path / str(workers)
        certificate = run(config(world, out, num_workers=workers))
        assert contents(out) == contents(made[0])
        assert certificate.content_hash() == made[1].content_hash()


def test_a_finished_job_is_recognised_and_another_config_is_refused(
    world: Any, made: tuple[Path, Certificate]
) -> None:
    before = contents(made[0])
    assert run(config(world, made[0])) == made[1]
    assert contents(made[0]) == before
    with pytest.raises(ConfigError, match=r"retrieve\.k: 5 there, 2 now"):
        run(config(world, made[0], retrieve={"k": 2}))


def test_retrievers_agree_on_form_and_the_clip_is_not_loaded_for_clips_of_the_memory(
    world: Any, ray_cluster: None, tmp_path: Path
) -> None:
    """The world's CLIP can't be loaded at all: its vectors are drawn; every vector comes from the table."""
    shown: dict[str, list[str]] = {}
    for name in ("bm25", "clip", "hybrid"):
        out = tmp_path / name
        run(config(world, out, target=REFERENCE, retrieve={"retriever": name, "k": 3}))
        documents = [s["document"] for row in read(out) for s in row["segments"][:-1:2]]
        assert {document["retriever"] for document in documents} == {name}
        assert validate(ValidateConfig(prompts=str(out))).is_valid
        shown[name] = [document["doc_id"] for document in documents]
    assert len({tuple(ids) for ids in shown.values()}) == 3


def test_fewer_survivors_than_k_give_fewer_documents_and_a_flag(
    world: Any, ray_cluster: None, tmp_path: Path
) -> None:
    certificate = run(config(world, tmp_path / "all", target=REFERENCE, retrieve={"k": 50, "depth": 2}))
    rows = read(tmp_path / "all")
    assert all(row["flags"] == ["fewer_than_k"] for row in rows)
    assert certificate.facts["fewer_than_k"] == len(rows)
    # 24 documents, 3 of them of the clip's own video; candidates were looked for beyond `depth`.
    assert max(row["num_documents"] for row in rows) == 21
    assert validate(ValidateConfig(prompts=str(tmp_path / "all"))).is_valid


def test_documents_below_min_score_are_not_given_and_counted(
    world: Any, made: tuple[Path, Certificate], tmp_path: Path
) -> None:
    best = {row["clip_id"]: [s["document"] for s in row["segments"][:-1:2]] for row in read(made[0])}
    every = sorted(document["score"] for documents in best.values() for document in documents)
    levels = sorted(set(every))
    least = sum(levels[len(levels) // 2 - 1 :][:2]) / 2  # between two: scores are stored rounded
    retrieve = {"k": 5, "min_score": least}
    certificate = run(config(world, tmp_path / "out", target=REFERENCE, retrieve=retrieve))
    for row in read(tmp_path / "out"):
        kept = [document for document in best[row["clip_id"]] if document["score"] >= least]
        assert [s["document"] for s in row["segments"][:-1:2]] == kept
        assert row["flags"] == (["fewer_than_k"] if len(kept) < 5 else [])
    assert certificate.facts["refused"]["low_score"] == sum(score < least for score in every) > 0


def test_no_documents_are_wanted_with_k_0(world: Any, ray_cluster: None, tmp_path: Path) -> None:
    run(config(world, tmp_path / "out", target=REFERENCE, retrieve={"k": 0}))
    assert {len(row["segments"]) for row in read(tmp_path / "out")} == {1}


def test_evaluation_items_are_neither_shown_nor_trained_on(
    world: Any, ray_cluster: None, tmp_path: Path
) -> None:
    exam = {row["source_uri"] for row in world.rows[:6]}
    (tmp_path / "exam.txt").write_text("\n".join(exam))
    guard = {"exclude": str(tmp_path / "exam.txt")}
    certificate = run(config(world, tmp_path / "out", target=REFERENCE, guard=guard))
    rows = read(tmp_path / "out")
    assert certificate.filtered == {"filtered_eval_split": 6}
    assert not exam & {row["source_uri"] for row in rows}
    shown = {s["document"]["source_uri"] for row in rows for s in row["segments"][:-1]}
    assert shown and not exam & shown
    assert validate(ValidateConfig(prompts=str(tmp_path / "out"))).is_valid


def test_copies_under_another_name_are_refused(world: Any, ray_cluster: None, tmp_path: Path) -> None:
    """The memory holds a re-upload of every video: other file, other caption, the same look."""
    reuploads = [
        row
        | {"source_uri": f"/other/{n}.mp4", "source_sha256": f"{n:064d}", "caption": f"{row['caption']} again"}
        for n, row in enumerate(world.rows)
    ]
    memory = world.write_memory(tmp_path / "memory", [*world.rows, *reuploads])
    certificate = run(config(world, tmp_path / "out", memory=memory))
    assert certificate.facts["refused"]["duplicate"] >= len(world.rows)
    for row in read(tmp_path / "out"):
        shown = {s["document"]["doc_id"] for s in row["segments"][:-1]}
        again = next(r for r in reuploads if r["caption"] == f"{row['caption']} again")
        assert row_doc_id(again) not in shown


def test_captions_of_every_kind_are_answered(world: Any, ray_cluster: None, tmp_path: Path) -> None:
    captions = ['"red" AND (dog OR', "猫が走る", "кот", "dog " * 3000, "😀", "a:b^2 ~dog* \\ [x TO y]"]
    rows = [
        row | {"caption": text, "clip_id": f"c{n}"}
        for n, (row, text) in enumerate(zip(world.rows[::3], captions, strict=False))
    ]
    clips = world.write_clips(tmp_path / "clips", rows)
    out = tmp_path / "out"
    run(config(world, out, clips=clips, target=REFERENCE, vectors="stored", retrieve={"k": 2}))
    found = [row["num_documents"] for row in read(out)]
    assert found[0] == found[3] == found[5] == 2 and found[4] == 0


def refused(world: Any, tmp_path: Path, words: str, **more: Any) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        check(config(world, tmp_path / "out", **more))
    assert "\n" not in str(error.value)


def test_a_disk_that_the_candidates_do_not_fit_is_refused(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = world.write_memory(tmp_path / "memory", world.rows, shard_rows=8)
    monkeypatch.setattr(join, "free_bytes", lambda place: 30_000)
    refused(world, tmp_path, r"24 captions in 3 shards need up to 47,232 bytes; .* has 30,000", memory=memory)
    check(config(world, tmp_path / "out", memory=memory, retrieve={"depth": 4}))
    check(config(world, tmp_path / "out"))  # one shard: no files
    file = tmp_path / "out" / join.FOLDER / "tile-00000-00000.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(18_000))  # of a run that was killed: it takes its room already
    check(config(world, tmp_path / "out", memory=memory))


def test_candidates_that_are_cut_short_or_of_another_version_are_told(tmp_path: Path) -> None:
    file = tmp_path / "out" / join.FOLDER / "tile-00000-00002.bin"
    file.parent.mkdir(parents=True)
    ends = np.array([0, 2, *[3] * (join.BLOCK_SLICES - 1)], np.int64)
    rows = np.zeros(3, join.CANDIDATE)
    file.write_bytes(ends.tobytes() + rows.tobytes())
    assert [len(join.read_part(str(file), place)) for place in (0, 1, 2)] == [2, 1, 0]
    file.write_bytes(ends.tobytes() + rows.tobytes()[:-8])
    with pytest.raises(DataError, match=r"tile-00000-00002.bin is cut short .* delete .*/out, and run again"):
        join.read_part(str(file), 0)


def test_wrong_inputs_are_refused_in_one_line(world: Any, tmp_path: Path) -> None:
    refused(world, tmp_path, "no certified crawl output", clips=str(tmp_path))
    refused(world, tmp_path, "was made by 'crawl'", memory=world.clips)
    refused(world, tmp_path, "no certified build-index", memory=str(tmp_path))
    refused(world, tmp_path, "embedded with 'offline'", clip={"name": "ViT-B-32"})
    refused(world, tmp_path, "no exclusion file", guard={"exclude": str(tmp_path / "absent.txt")})
    refused(world, tmp_path, "memory version 'x'", memory_version="x")
    stranger = world.write_clips(tmp_path / "other", [world.rows[0] | {"caption": "in no memory"}])
    lost = {"name": str(tmp_path / "lost.json"), "pretrained": "lost.pt"}
    refused(world, tmp_path, "a CLIP is needed to guard them", clips=stranger, clip=lost)
    check(config(world, tmp_path / "out", clips=stranger, vectors="stored"))
    empty = world.write_clips(tmp_path / "empty", [])
    refused(world, tmp_path, "no usable clip", clips=empty)
    with pytest.raises(ConfigError, match="retriever"):
        AugmentConfig.load(options={"clips": "a", "memory": "b", "out": "c", "retrieve.retriever": "bm52"})
