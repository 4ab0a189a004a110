"""Protocols become prompt shards, other layouts are refused, the exam stays out of training and retrieval."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from infra.errors import ConfigError
from infra.splits import is_held_out
from infra.storage import sha256_file
from model.sampling.requests import requests_in_shards
from model.training.config import Stage1Config
from model.training.preflight import inspect
from pipeline.evaluate.videos import find_videos
from pipeline.prompts.benchmark import BenchmarkConfig, check, run
from pipeline.prompts.benchmark.personalization import around
from pipeline.prompts.benchmark.ucf101 import plain_name, shares
from pipeline.prompts.exclusion import read_exclusion
from pipeline.schema import Role
from pipeline.shards import ShardSet
from tests.model.conftest import tiny_encoder, tiny_stage  # noqa: F401 # pyright: ignore[reportUnusedImport]
from tests.model.prompt_tables import prompt_row, write_shards
from tests.pipeline.clip_tables import clip_row, write_clips
from tests.pipeline.memory.memory_tables import documents, make_memory


def config(protocol: str, source: Path, **changes: Any) -> BenchmarkConfig:
    values = {"protocol": protocol, "source": str(source), "out": str(source.parent / "prompts")}
    return BenchmarkConfig.model_validate(values | changes)


def rows_of(place: str) -> list[dict[str, Any]]:
    shards = ShardSet(place)
    return [row for n in range(len(shards)) for row in shards.read_row_group(n).to_pylist()]


CLASSES = {"ApplyEyeMakeup": 3, "YoYo": 1}


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    folder = tmp_path / "ucf"
    lists = folder / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    videos = [f"{name}/v_{name}_g0{n}_c01.avi" for name, count in CLASSES.items() for n in range(2 * count)]
    for video in videos:
        (folder / "UCF-101" / video).parent.mkdir(parents=True, exist_ok=True)
        (folder / "UCF-101" / video).write_bytes(video.encode())
    (lists / "testlist01.txt").write_text("\n".join(videos[::2]) + "\n")
    (lists / "trainlist01.txt").write_text("".join(f"{video} 1\n" for video in videos[1::2]))
    return folder


def test_ucf101_asks_by_the_distribution_and_names_its_real_videos(ucf101: Path) -> None:
    certificate = run(config("ucf101", ucf101, videos=10))
    rows = rows_of(str(ucf101.parent / "prompts"))
    assert Counter(row["caption"] for row in rows) == {"apply eye makeup": 8, "yo yo": 2}  # 7.5 and 2.5
    assert len({row["prompt_id"] for row in rows}) == 10 == certificate.num_out
    assert certificate.facts["highlights"]["prompts"] == "class-names"
    real = find_videos(str(ucf101.parent / "prompts"))
    listed = set((ucf101 / "ucfTrainTestlist" / "testlist01.txt").read_text().split())
    assert {payload["uri"].partition("UCF-101/")[2] for payload in real} == listed
    assert len(real) == len(listed)  # each real video once, however many prompts it stands behind
    requests = requests_in_shards(str(ucf101.parent / "prompts"), 10, fps=24, original_size_px=(288, 512))
    assert len(requests) == 10 and requests[0].fps == 24
    before = certificate.content_hash()
    assert run(config("ucf101", ucf101, videos=10)).content_hash() == before  # found whole


def test_the_first_rows_of_ucf101_are_of_all_classes_by_their_sizes(ucf101: Path) -> None:
    certificate = run(config("ucf101", ucf101, videos=40))
    captions = [row["caption"] for row in rows_of(str(ucf101.parent / "prompts"))]
    for first in (4, 12, 40):
        assert Counter(captions[:first])["yo yo"] == first // 4
    assert certificate.facts["highlights"]["real"] == "4"


def test_the_certificate_counts_the_real_videos_that_are_used(ucf101: Path) -> None:
    certificate = run(config("ucf101", ucf101, videos=2))
    real = find_videos(str(ucf101.parent / "prompts"))
    assert certificate.facts["highlights"]["real"] == str(len(real)) == "2"


def test_class_prompts_are_the_users(ucf101: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("ApplyEyeMakeup: A woman paints her lids.\nYoYo: A yo-yo spins.\n")
    run(config("ucf101", ucf101, videos=4, class_prompts=str(tmp_path / "mine.yaml"), subset="all"))
    assert {row["caption"] for row in rows_of(str(tmp_path / "prompts"))} == {
        "A woman paints her lids.",
        "A yo-yo spins.",
    }
    (tmp_path / "mine.yaml").write_text("YoYo: A yo-yo spins.\n")
    with pytest.raises(ConfigError, match="no prompt for ApplyEyeMakeup"):
        check(config("ucf101", ucf101, class_prompts=str(tmp_path / "mine.yaml")))


def test_the_exam_is_listed_for_augment(ucf101: Path) -> None:
    run(config("ucf101", ucf101, videos=4))
    listed = read_exclusion(str(ucf101.parent / "prompts" / "exclude.jsonl"))
    videos = sorted((ucf101 / "UCF-101").rglob("*.avi"))
    assert listed.hashes == {sha256_file(str(video)) for video in videos}  # all lists: their clips are kin
    assert {str(video) for video in videos} <= listed.sources


@pytest.mark.parametrize(
    ("gone", "word"),
    [
        ("ucfTrainTestlist/classInd.txt", "no ucfTrainTestlist/classInd.txt"),
        ("ucfTrainTestlist/testlist01.txt", "no ucfTrainTestlist/testlist01.txt"),
        ("UCF-101/YoYo/v_YoYo_g00_c01.avi", r"v_YoYo_g00_c01.avi \(1 of 4 listed"),
    ],
)
def test_another_layout_of_ucf101_is_refused(ucf101: Path, gone: str, word: str) -> None:
    (ucf101 / gone).unlink()
    with pytest.raises(ConfigError, match=word) as error:
        check(config("ucf101", ucf101))
    assert "UCF-101/<Class>" in str(error.value)


def test_shares_add_up_and_names_come_apart() -> None:
    assert shares(Counter({"a": 1, "b": 1, "c": 1}), 10) == {"a": 4, "b": 3, "c": 3}
    assert shares(Counter({"a": 7, "b": 3}), 5) == {"a": 4, "b": 1}  # 3.5 and 1.5
    assert plain_name("HandstandPushups") == "handstand pushups"


@pytest.fixture
def msrvtt(tmp_path: Path) -> Path:
    folder = tmp_path / "msrvtt"
    (folder / "TestVideo").mkdir(parents=True)
    splits = {"video1": "test", "video2": "train", "video3": "test"}
    for name in splits:
        (folder / "TestVideo" / f"{name}.mp4").write_bytes(name.encode())
    address = "https://www.youtube.com/watch?v="
    videos = [{"video_id": n, "split": s, "url": f"{address}{n:x>11}"} for n, s in splits.items()]
    sentences = [
        {"video_id": name, "sen_id": 10 * k + n, "caption": f"{name} says {k}"}
        for n, name in enumerate(splits)
        for k in range(3)
    ]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    return folder


def test_msrvtt_asks_for_every_caption_of_its_test_split(msrvtt: Path, tmp_path: Path) -> None:
    certificate = run(config("msrvtt", msrvtt))
    rows = rows_of(str(tmp_path / "prompts"))
    assert sorted(row["caption"] for row in rows) == [f"video{n} says {k}" for n in (1, 3) for k in range(3)]
    assert "2,990" in certificate.facts["remarks"][0]
    assert len(find_videos(str(tmp_path / "prompts"))) == 2
    listed = read_exclusion(str(tmp_path / "prompts" / "exclude.jsonl"))
    assert "xxxxxvideo1" in listed.sources and len(listed.hashes) == 2
    assert "1 prompts of" not in check(config("msrvtt", msrvtt, captions_per_video=1))
    assert "2 prompts of msrvtt" in check(config("msrvtt", msrvtt, captions_per_video=1))


def test_the_first_rows_of_msrvtt_are_of_as_many_clips_as_there_are(msrvtt: Path, tmp_path: Path) -> None:
    run(config("msrvtt", msrvtt))
    captions = [row["caption"] for row in rows_of(str(tmp_path / "prompts"))]
    assert captions == [f"video{n} says {k}" for k in range(3) for n in (1, 3)]


def test_sentences_are_in_the_order_of_their_numbers_however_those_are_written(
    msrvtt: Path, tmp_path: Path
) -> None:
    values = json.loads((msrvtt / "MSRVTT_data.json").read_text())
    numbers = iter([10, "9", "x"] * 3)
    sentences = [s | {"sen_id": next(numbers)} for s in values["sentences"] if s["video_id"] != "video2"]
    sentences.sort(key=lambda s: s["video_id"])
    (msrvtt / "MSRVTT_data.json").write_text(json.dumps(values | {"sentences": sentences}))
    run(config("msrvtt", msrvtt))
    captions = [row["caption"] for row in rows_of(str(tmp_path / "prompts"))]
    assert [caption for caption in captions if "video1" in caption] == [f"video1 says {k}" for k in (1, 0, 2)]


def test_no_prompt_of_an_exam_is_given_its_own_clip(msrvtt: Path, tmp_path: Path) -> None:
    files = [str(msrvtt / "TestVideo" / f"video{n}.mp4") for n in (1, 2, 3)]
    rows = documents(4, texts=[f"video{n} says {k}" for n, k in ((1, 0), (2, 0), (3, 0), (1, 1))])
    kept = {
        "source_uri": [*files, "https://elsewhere/copy.mp4"],
        "source_sha256": [None] * 3 + [sha256_file(files[0])],
    }
    for name, values in kept.items():
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(place), pa.array(values, pa.string()))
    make_memory(str(tmp_path / "memory"), rows)
    run(config("msrvtt", msrvtt, memory=str(tmp_path / "memory")))
    made = [row["segments"] for row in rows_of(str(tmp_path / "prompts"))]
    shown = {s["text"] for segments in made for s in segments if s["role"] == Role.RETRIEVED and s["text"]}
    assert shown == {"video2 says 0"}  # of the train split; the copy is known by its bytes


def test_another_layout_of_msrvtt_is_refused(msrvtt: Path) -> None:
    with pytest.raises(ConfigError, match=r"no split 'exam'; splits there: test, train"):
        check(config("msrvtt", msrvtt, split="exam"))
    (msrvtt / "TestVideo" / "video3.mp4").unlink()
    with pytest.raises(ConfigError, match="no video of video3"):
        check(config("msrvtt", msrvtt))
    with pytest.raises(ConfigError, match=r"MSRVTT_data\.json is a file; cure"):
        check(config("msrvtt", msrvtt / "MSRVTT_data.json"))
    (msrvtt / "MSRVTT_data.json").write_text("[]")
    with pytest.raises(ConfigError, match="no annotations"):
        check(config("msrvtt", msrvtt))


@pytest.fixture
def personalization(tmp_path: Path) -> Path:
    folder = tmp_path / "personal"
    for name, subjects in (("video1_a", ["red dog"]), ("video2_b", ["cat", "man"]), ("video3_c", ["cat"])):
        place = folder / name
        place.mkdir(parents=True)
        (place / "video.mp4").write_bytes(name.encode())
        (place / "summary_text.txt").write_text(f"A {subjects[0]} is in a yard.")
        words = {"subject": subjects, "subject_with_face": [], "background": ["yard"]}
        (place / "word_tags.json").write_text(json.dumps(words))
        Image.new("RGB", (8, 8), "green").save(place / "background.jpg")
        for frame in (1, 2, 3):
            picture = Image.new("RGBA", (8, 8), (50 * frame, 0, 0, 255))
            picture.save(place / f"{subjects[0].replace(' ', '_')}.frame{frame}.png")
    return folder


def test_personalization_puts_the_subjects_picture_in_the_place_of_its_word(personalization: Path) -> None:
    run(config("personalization", personalization))
    rows = rows_of(str(personalization.parent / "prompts"))
    assert [row["caption"] for row in rows] == ["A red dog is in a yard.", "A cat is in a yard."]
    segments = rows[0]["segments"]
    assert [(s["role"], s["text"]) for s in segments[1:]] == [
        ("caption", "A"),
        ("subject", "red dog"),
        ("caption", "is in a yard."),
    ]
    assert segments[0]["role"] == Role.INSTRUCTION
    middle = (personalization / "video1_a" / "red_dog.frame2.png").read_bytes()
    assert segments[2]["image"] == middle
    with pytest.raises(ConfigError, match=r"holds the output of another benchmark"):
        run(config("personalization", personalization, pictures="multi"))
    out = str(personalization.parent / "multi")
    run(config("personalization", personalization, pictures="multi_background", out=out))
    roles = Counter(s["role"] for s in rows_of(out)[0]["segments"])
    assert roles["subject"] == 3 and roles["background"] == 1
    (personalization / "video3_c" / "cat.frame1.png").rename(personalization / "video3_c" / "x.png")
    for frame in (2, 3):
        (personalization / "video3_c" / f"cat.frame{frame}.png").unlink()
    with pytest.raises(ConfigError, match=r"no picture cat\.frame\*\.png"):
        check(config("personalization", personalization))


def test_an_exam_of_nothing_is_refused(ucf101: Path, msrvtt: Path, personalization: Path) -> None:
    (ucf101 / "ucfTrainTestlist" / "testlist01.txt").write_text("\n")
    values = json.loads((msrvtt / "MSRVTT_data.json").read_text())
    strangers = [{"video_id": "other", "sen_id": 1, "caption": "a"}]
    (msrvtt / "MSRVTT_data.json").write_text(json.dumps(values | {"sentences": strangers}))
    nothing = [config("ucf101", ucf101), config("msrvtt", msrvtt), config("personalization", personalization)]
    for asked in (*nothing[:2], nothing[2].model_copy(update={"mode": "face"})):
        with pytest.raises(ConfigError, match=rf"no prompt of {asked.protocol} in .*; legal: .*; cure: "):
            check(asked)


def test_a_sentence_without_a_caption_is_refused(msrvtt: Path) -> None:
    values = json.loads((msrvtt / "MSRVTT_data.json").read_text())
    del values["sentences"][0]["caption"]
    (msrvtt / "MSRVTT_data.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"a sentence of video1 without a caption.*; legal: a JSON file"):
        check(config("msrvtt", msrvtt))


@pytest.mark.parametrize("subject", [7, [None], {"dog": 1}, "dog", [""]])
def test_subjects_that_are_no_list_of_words_are_refused(personalization: Path, subject: Any) -> None:
    (personalization / "video1_a" / "word_tags.json").write_text(json.dumps({"subject": subject}))
    with pytest.raises(ConfigError, match=r"word_tags\.json: subject is .*, no list of words; legal: "):
        check(config("personalization", personalization))


def test_a_missing_background_is_refused_where_it_is_asked_for(personalization: Path) -> None:
    (personalization / "video3_c" / "background.jpg").unlink()
    check(config("personalization", personalization))
    with pytest.raises(ConfigError, match=r"video3_c has no background\.jpg; legal: "):
        check(config("personalization", personalization, pictures="multi_background"))


def test_a_word_that_the_caption_lacks_has_its_picture_in_front() -> None:
    picture = {"type": "image", "text": "dog"}
    assert [part["type"] for part in around("A cat sits.", "dog", [picture])] == ["image", "text"]
    assert [part["text"] for part in around("Dogs and a dog", "dog", [picture])] == ["Dogs and a", "dog"]


def test_own_rows_are_those_that_training_keeps_back(tmp_path: Path) -> None:
    rows = [prompt_row(n) for n in range(60)]
    source = write_shards(tmp_path / "all", rows, job="augment", group_rows=8, file_rows=30)
    run(config("own", source, held_out_frac=0.2))
    made = rows_of(str(tmp_path / "prompts"))
    held = [row for row in rows if is_held_out(row["source_uri"], None, 0.2) and row["media"] == "video"]
    assert {row["prompt_id"] for row in made} == {row["prompt_id"] for row in held} and made[0][
        "num_documents"
    ] == 1
    listed = read_exclusion(str(tmp_path / "prompts" / "exclude.jsonl"))
    assert listed.ids == {row["clip_id"] for row in held}
    with pytest.raises(ConfigError, match="is held out"):
        check(config("own", source, held_out_frac=0))


def test_own_clips_are_listed_by_their_source_not_by_where_their_bytes_lie(tmp_path: Path) -> None:
    piece = tmp_path / "a.tar"
    piece.write_bytes(b"bytes")
    row = clip_row(piece, "a red ball", media="video", end_s=2.0, split="test", source_uri="a.tar/7.mp4")
    run(config("own", Path(write_clips(tmp_path / "clips", [row | {"source_sha256": "a" * 64}]))))
    listed = read_exclusion(str(tmp_path / "prompts" / "exclude.jsonl"))
    assert listed.ids == {row["clip_id"]}
    assert (listed.sources, listed.hashes) == ({"a.tar/7.mp4"}, {"a" * 64})


def test_no_training_on_the_exam(tmp_path: Path, tiny_encoder: dict[str, Any]) -> None:  # noqa: F811
    rows = [prompt_row(n) for n in range(60)]
    source = write_shards(tmp_path / "all", rows, job="augment", group_rows=8, file_rows=30)
    run(config("own", source, held_out_frac=0.2))
    stage = tiny_stage(tmp_path / "prompts", tmp_path / "run", tiny_encoder)
    with pytest.raises(ConfigError, match="holds the prompts of a benchmark"):
        inspect(Stage1Config.model_validate(stage))
