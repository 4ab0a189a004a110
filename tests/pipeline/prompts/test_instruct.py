"""Laws of the instructions: every draw accounted for, words replaced in place, the same bytes always."""

import io
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from infra.certificate import Certificate, read_certificate, write_certificate
from infra.clip import ClipConfig
from infra.cluster import RayConfig
from infra.errors import ConfigError, TooManyFailuresError
from model.data.sample import decode_video
from pipeline.job import output_hash
from pipeline.journal import JournalWriter
from pipeline.media.clip import first_frame
from pipeline.prompts.inputs import plan_units
from pipeline.prompts.instruct import InstructConfig, InstructWorker, check, input_hashes, run
from pipeline.prompts.subjects.cutout import Picture
from pipeline.prompts.subjects.entities import find_entities
from pipeline.prompts.subjects.finder import FinderConfig, SubjectConfig, SubjectFinder
from pipeline.prompts.tasks import (
    MAX_FIRST_PX,
    RECIPES,
    Draw,
    Made,
    Recipe,
    draw_tasks,
    first_frame_px,
    replace_words,
    text,
)
from pipeline.schema import PROMPTS, REJECTED, Role, RowError, Task, content_id
from pipeline.shards import ShardSet, shard_name, write_meta, write_shard
from tests.infra import tiny_grounders
from tests.infra.tiny_clips import MODELS, save_tiny
from tests.pipeline.conftest import WriteVideo, numbered_frame


def draw_frame(number: int, height: int = 180, width: int = 320) -> np.ndarray:
    """A red ball that rolls over noisy grass."""
    random = np.random.default_rng(number)
    grass = random.integers(40, 90, (height, width, 3)) * np.array([0.6, 1.6, 0.5])
    image = Image.fromarray(grass.astype(np.uint8))
    left = 60 + 4 * number
    ImageDraw.Draw(image).ellipse((left, 40, left + 100, 140), fill=(220, 30, 30))
    return np.asarray(image)


def jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def ball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real mp4 of 16 frames at 8 frames per second."""
    path = tmp_path_factory.mktemp("video") / "ball.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        stream.time_base = Fraction(1, 8)
        stream.bit_rate = 4_000_000
        for number in range(16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_frame(number), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def prompt(
    number: int, source: Path, caption: str, *, documents: int = 1, media: str = "video"
) -> dict[str, Any]:
    """A row as `augment` makes it."""
    frames = np.stack([draw_frame(i, 36, 64) for i in range(4)])
    picture = jpeg(draw_frame(number))
    origin = {"retriever": "bm25", "rank": 1, "score": 2.0, "clip_similarity": 0.3}
    none = dict.fromkeys(["source_uri", "source_sha256", "start_s", "end_s"])
    retrieved = []
    for rank in range(1, documents + 1):
        document = {**origin, **none, "doc_id": f"d{number}-{rank}", "rank": rank}
        base = {"role": "retrieved", "document": document}
        retrieved.append({**base, "type": "text", "text": f"text {rank}", "image": None})
        retrieved.append({**base, "type": "image", "text": None, "image": picture})
    own = {"type": "text", "role": "caption", "text": caption, "image": None, "document": None}
    row: dict[str, Any] = dict.fromkeys(PROMPTS.names)
    target = {"kind": "frames", "data": frames.tobytes(), "num_frames": 4, "height_px": 36, "width_px": 64}
    return row | {
        "prompt_id": content_id("p", number),
        "task": "pretrain",
        "clip_id": content_id("c", number),
        "media": media,
        "caption": caption,
        "segments": [*retrieved, own],
        "num_documents": documents,
        "flags": [],
        "target": {**target, "fps": 2.0},
        "source_uri": str(source),
        "start_s": 0.0,
        "end_s": 2.0,
        "width_px": 320,
        "height_px": 180,
        "fps": 8.0,
    }


def save_prompts(folder: Path, rows: list[dict[str, Any]], *, row_group_rows: int = 2) -> str:
    folder.mkdir(parents=True)
    out = str(folder)
    entry = write_shard(f"{out}/{shard_name(0)}", rows, PROMPTS, row_group_rows=row_group_rows)
    meta = write_meta(out, [entry], row_group_rows=row_group_rows)
    n = len(rows)
    certificate = Certificate(job="augment", config_hash="x", num_in=n, num_out=n, files=[entry, meta])
    write_certificate(out, certificate)
    return out


@pytest.fixture(scope="module")
def prompts(ball: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("prompts")
    picture = folder / "ball.jpg"
    picture.write_bytes(jpeg(draw_frame(3)))
    rows = [
        prompt(0, ball, "A red ball is rolling over the grass."),
        prompt(1, ball, "Two balls and some birds"),
        prompt(2, ball, "a ball lies on grass", documents=2),
        prompt(3, picture, "A ball in the grass", media="image"),
        prompt(4, ball, "A ball is rolling", documents=0),
        prompt(5, folder / "gone.mp4", "A ball whose source is gone"),
    ]
    rows.append(prompt(6, folder / "gone.mp4", "A ball that is only referred to"))
    rows[-1]["target"] = {**rows[-1]["target"], "kind": "reference", "data": None}
    return save_prompts(folder / "prompts", rows)


def config(prompts: str, out: Path, **values: Any) -> InstructConfig:
    subjects = SubjectConfig(clip=None, background_prob=1.0)
    values = {"subjects": subjects, "unit_rows": 2, "num_workers": 2, **values}
    return InstructConfig(prompts=prompts, out=str(out), ray=RayConfig(num_cpus=2), **values)


def read_rows(out: Path) -> list[dict[str, Any]]:
    shards = ShardSet(str(out))
    return [row for i in range(len(shards)) for row in shards.read_row_group(i).to_pylist()]


def folder_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.parquet"))}


@pytest.fixture(scope="module")
def made(prompts: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("instruct") / "whole"
    run(config(prompts, out))
    return out


@pytest.mark.ray
def test_every_draw_is_an_instruction_or_has_a_reason(made: Path):
    certificate = read_certificate(made, job="instruct")
    assert certificate is not None
    rejected = pq.read_table(made / "rejected.parquet").to_pylist()
    assert certificate.num_in == 7 * 3 == len(read_rows(made)) + len(rejected)
    assert certificate.filtered["filtered_no_document"] == 1
    assert certificate.filtered["filtered_not_video"] == 1
    assert certificate.dead == {"not_found": 2}
    assert any("names no single subject" in row["error"] for row in rejected)
    assert pq.read_schema(made / "rejected.parquet").equals(REJECTED)


@pytest.mark.ray
def test_the_three_tasks_have_the_papers_forms(made: Path):
    rows = {(row["task"], row["caption"]): row for row in read_rows(made)}
    caption = "A red ball is rolling over the grass."

    def shape(task: Task) -> list[tuple[str, str | None]]:
        row = rows[task, caption]
        assert row["segments"][0]["text"] == RECIPES[task].instruction
        assert row["segments"][0]["role"] == Role.INSTRUCTION
        return [(s["type"], s["text"]) for s in row["segments"][1:]]

    assert shape(Task.SUBJECT_DRIVEN) == [
        ("text", "A "),
        ("image", "red ball"),
        ("text", " is rolling over the "),
        ("image", "grass"),
        ("text", "."),
    ]
    assert shape(Task.VIDEO_PREDICTION) == [("text", caption), ("image", None)]
    assert shape(Task.TEXT_TO_VIDEO) == [("text", "text 1"), ("image", None), ("text", caption)]
    assert rows[Task.TEXT_TO_VIDEO, "a ball lies on grass"]["num_documents"] == 2
    assert len({row["prompt_id"] for row in rows.values()}) == len(rows)


@pytest.mark.ray
def test_first_frame_is_the_first_frame_and_pictures_are_pictures(made: Path):
    for row in read_rows(made):
        for segment in row["segments"]:
            if segment["type"] == "image":
                Image.open(io.BytesIO(segment["image"])).load()
            if segment["role"] == Role.FIRST_FRAME and not row["flags"]:
                found = np.asarray(Image.open(io.BytesIO(segment["image"]))).astype(int)
                assert np.abs(found - draw_frame(2)).mean() < 12
    lost = [row for row in read_rows(made) if row["caption"] == "A ball whose source is gone"]
    assert {row["task"]: row["flags"] for row in lost} == {
        "video_prediction": ["frames_from_target"],
        "text_to_video": [],
    }


def test_a_first_frame_is_as_fine_as_the_frames_that_training_shows(write_video: WriteVideo, tmp_path: Path):
    video = write_video(tmp_path / "wide.mp4", num_frames=8, fps=8, size_px=(360, 640))
    finder, sizes = SubjectFinder(SubjectConfig(clip=None)), []
    for height, width in [(36, 64), (270, 480), (None, None)]:
        row: dict[str, Any] = prompt(0, video, "Waves slide.") | {"end_s": 1.0}
        row |= {"height_px": 360, "width_px": 640}  # what a target that augment only refers to is shown from
        row["target"] |= {"height_px": height, "width_px": width, "data": None, "kind": "reference"}
        segments, _ = RECIPES[Task.VIDEO_PREDICTION].make(Draw(row, None, finder, seed=0))
        sizes.append(Image.open(io.BytesIO(segments[1]["image"])).size)
    assert sizes == [(336, 189), (480, 270), (640, 360)]
    row = prompt(0, video, "Waves") | {"height_px": 4320, "width_px": 7680, "target": {"kind": "reference"}}
    assert first_frame_px(row) == MAX_FIRST_PX  # whose pixels training may decode


@pytest.mark.parametrize("start_s", [0.0, 0.3, 0.375])
@pytest.mark.parametrize("begins_s", [0, 2])
def test_the_first_frame_of_a_referred_span_is_the_one_that_training_begins_with(
    start_s: float, begins_s: int, write_video: WriteVideo, tmp_path: Path
):
    times = [Fraction(n, 8) + begins_s for n in range(8)]
    video = write_video(tmp_path / "film.mkv", num_frames=8, fps=8, times=times)
    with av.open(str(video)) as container:
        assert (container.streams.video[0].start_time or 0) == 1000 * begins_s
    row = prompt(0, video, "Waves") | {"start_s": start_s, "end_s": 1.0, "target": {"kind": "reference"}}
    shown = first_frame(row)
    trained, _ = decode_video(str(video), 2, span_s=(start_s, 1.0))
    assert np.array_equal(shown.frames[0], trained[0]) and not shown.from_target
    away = [np.abs(shown.frames[0].astype(int) - numbered_frame(n)).mean() for n in range(8)]
    assert int(np.argmin(away)) == (3 if start_s else 0)
    with pytest.raises(RowError, match="no frame from 7 s on"):
        first_frame(row | {"start_s": 7.0, "end_s": 8.0})


@pytest.mark.ray
def test_same_bytes_for_any_workers_and_after_a_stop(
    made: Path, prompts: str, ray_cluster: None, tmp_path: Path
):
    stopped = tmp_path / "stopped"
    wanted = config(prompts, stopped, num_workers=1)
    units = list(plan_units(ShardSet(prompts), None, wanted.unit_rows))
    inputs = input_hashes(wanted, ShardSet(prompts))
    worker = InstructWorker(wanted, output_hash(wanted, inputs), RECIPES)
    journal = JournalWriter(f"{stopped}/journal", "before")
    journal.append(units[1].id, worker(units[1].payload))
    journal.close()
    (stopped / shard_name(0)).write_bytes(b"half a shard")
    run(wanted)
    assert folder_bytes(stopped) == folder_bytes(made)
    assert run(wanted) == read_certificate(stopped)


@pytest.mark.ray
def test_too_many_unreadable_sources_fail_the_job(prompts: str, ray_cluster: None, tmp_path: Path):
    with pytest.raises(TooManyFailuresError, match="not_found"):
        run(config(prompts, tmp_path / "out", max_failed_frac=0.01, tasks=(Task.VIDEO_PREDICTION,)))
    assert read_certificate(tmp_path / "out") is None


@given(st.integers(0, 1000), st.integers(0, 10**9), st.permutations(list(RECIPES)))
def test_a_draw_depends_on_seed_and_clip_alone(seed: int, number: int, order: list[str]):
    drawn = [draw_tasks(order, {}, seed=seed, clip_id=str(number)) for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 1 and drawn[0][0] in order
    assert draw_tasks(order, None, seed=seed, clip_id=str(number)) == order


def test_draws_follow_the_proportions():
    weights: dict[str, float] = {Task.SUBJECT_DRIVEN: 2.0, Task.VIDEO_PREDICTION: 2.0, Task.TEXT_TO_VIDEO: 0.0}
    draws = (draw_tasks(list(RECIPES), weights, seed=0, clip_id=str(i)) for i in range(4000))
    drawn = Counter(task for tasks in draws for task in tasks)
    assert drawn[Task.TEXT_TO_VIDEO] == 0
    assert abs(drawn[Task.SUBJECT_DRIVEN] / 4000 - 0.5) < 0.03


@given(st.text(max_size=60), st.integers(0, 3))
def test_text_and_replaced_words_joined_are_the_caption(tail: str, count: int):
    caption = f"A red dog is playing in the grass with a ball. {tail}"
    entities = find_entities(caption)[: max(count, 1)]
    pictures = [Picture(entity, Role.SUBJECT, b"x") for entity in reversed(entities)]
    segments = replace_words(caption, pictures)
    assert "".join(segment["text"] for segment in segments) == caption
    assert sum(segment["type"] == "image" for segment in segments) == len(pictures)


@pytest.mark.ray
def test_grounded_subjects_are_of_the_networks_weights_wherever_they_lie(
    prompts: str, ray_cluster: None, tmp_path: Path
):
    """A random detector: nothing is found for sure, each phrase says why, and other weights are another job."""
    places = [tiny_grounders.save("sam3", tmp_path / name) for name in ("one", "two")]
    out, (name, weights) = tmp_path / "out", save_tiny(tmp_path, MODELS["vit"])
    clip = ClipConfig(name=name, pretrained=weights)

    def of(place: str) -> InstructConfig:
        finder = FinderConfig(kind="grounded", detector=place)
        return config(prompts, out, tasks=("subject_driven",), subjects=SubjectConfig(finder=finder, clip=clip))

    made = run(of(places[0]))
    assert made.num_in == 7 and sum(made.facts["reasons"].values()) == 7 - made.num_out > 0
    Path(weights).write_bytes(Path(weights).read_bytes() + b"other")
    with pytest.raises(ConfigError, match=r"holds the output of another instruct run .*clip"):
        run(of(places[0]))
    save_tiny(tmp_path, MODELS["vit"])
    shutil.rmtree(places[0])
    assert run(of(places[1])).content_hash() == made.content_hash()
    (Path(places[1]) / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match=r"holds the output of another instruct run .*detector"):
        run(of(places[1]))


def test_relative_paths_are_the_same_place_for_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").write_bytes(b"onnx")
    subjects = SubjectConfig.model_validate({"mask_model": "net.onnx"})
    found = config("prompts", Path("out"), subjects=subjects)
    assert found.subjects.mask_model == str(tmp_path / "net.onnx")
    assert (found.prompts, found.out) == (str(tmp_path / "prompts"), str(tmp_path / "out"))


def test_wrong_inputs_are_refused_before_ray_starts(prompts: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="vimi-data augment"):
        check(config(str(tmp_path / "nowhere"), tmp_path / "out"))
    with pytest.raises(ConfigError, match="vimi-data crawl"):
        check(config(prompts, tmp_path / "out", clips=str(tmp_path)))
    with pytest.raises(ConfigError, match="u2netp"):
        InstructConfig.load(overrides=[f"prompts={prompts}", "out=o", "subjects.mask_model=/no/model.onnx"])
        check(config(prompts, tmp_path / "out", subjects=SubjectConfig(mask_model="/no")))
    with pytest.raises(ConfigError, match="give each task once"):
        InstructConfig.load(overrides=["prompts=p", "out=o", "tasks=[pretrain]"])
    with pytest.raises(ConfigError, match="weight"):
        check(config(prompts, tmp_path / "out", proportions=dict.fromkeys(RECIPES, 0.0)))


def count_words(draw: Draw) -> Made:
    return [text(f"{len(draw.caption.split())} words", Role.CAPTION)], []


@pytest.mark.ray
def test_a_task_from_outside_is_made_like_the_papers(
    prompts: str, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(RECIPES, "counting", Recipe("Count.", count_words))
    certificate = run(config(prompts, tmp_path / "out", tasks=("counting",)))
    rows = read_rows(tmp_path / "out")
    assert certificate.num_out == len(rows) == 7 and certificate.facts["tasks"] == {"counting": 7}
    assert [s["text"] for s in rows[0]["segments"]] == ["Count.", "8 words"]


@pytest.mark.ray
def test_a_folder_of_another_run_is_refused(made: Path, prompts: str):
    with pytest.raises(ConfigError, match="seed"):
        run(config(prompts, made, seed=7))
