"""Laws of the table of crops and of cross-pairs: each row with its fate, no reference out of its own clip."""

import html
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.certificate import Certificate, read_certificate, write_certificate
from infra.clip import ClipConfig
from infra.cluster import RayConfig
from infra.errors import ConfigError, TooManyFailuresError
from model.condition import MAX_REFERENCES
from pipeline.journal import JournalWriter
from pipeline.prompts.inputs import plan_units
from pipeline.prompts.instruct import InstructConfig, check, run
from pipeline.prompts.subjects import job
from pipeline.prompts.subjects.crops import clip_crops, document_crops, places_of
from pipeline.prompts.subjects.entities import find_entities
from pipeline.prompts.subjects.finder import SubjectConfig, SubjectFinder
from pipeline.prompts.subjects.job import CropsConfig, CropsWorker
from pipeline.prompts.subjects.pairs import (
    NUM_LOOKED_AT,
    Tally,
    cross_references,
    disjoint,
    histogram,
)
from pipeline.prompts.subjects.verdict import Reason
from pipeline.prompts.tasks import MAX_PICTURES, RECIPES, Choice, Draw, thinned
from pipeline.report.page import run as make_page
from pipeline.report.read import ReportConfig
from pipeline.schema import CROP_PLACES, CROPS, Role, Task, crop_id
from pipeline.shards import PLACES_FILE, ShardSet, shard_name, write_shard
from tests.pipeline.prompts.test_instruct import ball as ball
from tests.pipeline.prompts.test_instruct import draw_frame, jpeg, prompt, read_rows, save_prompts
from tests.pipeline.prompts.test_instruct import prompts as prompts

SUBJECTS = SubjectConfig(clip=None, background_prob=1.0)
RAY = RayConfig(num_cpus=2)


def read_table(out: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(out.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def folder_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.parquet"))}


@pytest.fixture(scope="module")
def crops(prompts: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("crops") / "whole"
    job.run(CropsConfig(prompts=prompts, out=str(out), subjects=SUBJECTS, unit_rows=2, num_workers=2, ray=RAY))
    return out


@pytest.mark.ray
def test_every_clip_has_a_row_that_says_what_became_of_its_words(crops: Path, prompts: str):
    rows = read_table(crops)
    certificate = read_certificate(crops, job="subjects")
    assert certificate is not None and certificate.num_in == len(rows)
    assert certificate.num_out == sum(row["status"] == "ok" for row in rows)
    shards = ShardSet(prompts)
    clips = [
        i for g in range(len(shards)) for i in shards.read_row_group(g, ["clip_id"])["clip_id"].to_pylist()
    ]
    assert {row["clip_id"] for row in rows} == set(clips)
    assert len({row["crop_id"] for row in rows}) == len(rows)
    for row in rows:
        assert (row["status"] == "ok") == (row["score"] is not None) == (row["error"] is None)
        assert (row["phrase"] is None) == (row["image"] is None)
    assert certificate.dead == {"not_found": 1}
    assert {row["nature"] for row in rows if row["status"] == "ok"} == {"product", "place"}
    assert pq.read_schema(crops / shard_name(0)).equals(CROPS)
    dead = {"not_found"}
    told = Counter(row["status"] if row["status"] in dead else row["error"] for row in rows if row["error"])
    assert certificate.facts["reasons"] == told and told["not_found"] == 1  # not its file's name


def test_what_a_document_and_a_place_do_not_show_has_a_row_with_the_reason(tmp_path: Path):
    finder = SubjectFinder(SUBJECTS)
    row = prompt(0, tmp_path, "A red ball lies on grass", documents=3)
    texts = {"text 1": "a red ball in the grass", "text 2": "some birds", "text 3": "a blue ball"}
    for segment in row["segments"]:
        origin = segment["document"]
        if origin:
            segment["document"] = {**origin, "doc_id": f"doc {origin['rank']}"}
            segment["text"] = segment["text"] and texts[segment["text"]]
            if segment["image"] and origin["rank"] == 3:
                segment["image"] = b"no picture"
    found = document_crops(row, finder, at_most=3)
    assert [(crop["doc_id"], crop["phrase"], crop["status"]) for crop in found] == [
        ("doc 1", "red ball", "ok"),
        ("doc 2", None, "filtered_no_subject"),
        ("doc 3", None, "undecodable"),
    ]
    picture = tmp_path / "grey.jpg"
    picture.write_bytes(jpeg(np.full((90, 160, 3), 128, np.uint8)))
    grey = prompt(1, picture, "A ball in the grass", media="image")
    own = clip_crops(grey, finder, np.random.default_rng(0), local_uri=None)
    place = next(crop for crop in own if crop["nature"] == "place")
    assert (place["status"], place["error"]) == ("filtered_no_subject", Reason.NOTHING_CUT)
    assert place["image"] and place["vector"] is None and all(crop["status"] != "ok" for crop in own)


@pytest.mark.ray
def test_too_many_unreadable_clips_fail_the_job_however_many_crops_the_others_give(
    ball: Path, ray_cluster: None, tmp_path: Path
):
    rows = [prompt(i, ball, "A red ball is rolling over the grass.") for i in range(2)]
    rows += [prompt(i, tmp_path / "gone.mp4", "A ball") for i in range(2, 5)]
    for row in rows[2:]:
        row["target"] = {**row["target"], "kind": "reference", "data": None}
    prompts = save_prompts(tmp_path / "prompts", rows)
    config = CropsConfig(prompts=prompts, out=str(tmp_path / "out"), subjects=SUBJECTS, ray=RAY)
    with pytest.raises(TooManyFailuresError, match=r"3 of 5 clips .*not_found 3.*gone\.mp4"):
        job.run(config)


@pytest.mark.ray
def test_same_bytes_for_any_workers_and_after_a_stop(
    crops: Path, prompts: str, ray_cluster: None, tmp_path: Path
):
    wanted = CropsConfig(
        prompts=prompts, out=str(tmp_path / "out"), subjects=SUBJECTS, unit_rows=2, num_workers=1, ray=RAY
    )
    unit = list(plan_units(ShardSet(prompts), None, 2))[1]
    journal = JournalWriter(f"{wanted.out}/journal", "before")
    journal.append(unit.id, CropsWorker(wanted)(unit.payload))
    journal.close()
    (tmp_path / "out" / shard_name(0)).write_bytes(b"half a shard")
    job.run(wanted)
    assert folder_bytes(tmp_path / "out") == folder_bytes(crops)


@pytest.mark.ray
def test_instructions_out_of_the_table_are_those_that_are_made_without_it(
    crops: Path, prompts: str, ray_cluster: None, tmp_path: Path
):
    shown = []
    for name, table in [("with", str(crops)), ("without", None)]:
        out = tmp_path / name
        config = InstructConfig(
            prompts=prompts, out=str(out), subjects=SUBJECTS, crops=table, references=1, ray=RAY
        )
        run(config.model_copy(update={"tasks": (Task.SUBJECT_DRIVEN,)}))
        shown.append({row["clip_id"]: row["segments"] for row in read_rows(out) if not row["flags"]})
    assert shown[0] == shown[1] and len(shown[0]) >= 3


def crop(clip: str, span: tuple[float, float], vector: list[float], **values: Any) -> dict[str, Any]:
    """A row of CROPS; `vector` is made a unit one."""
    unit = np.asarray(vector, np.float64) / np.linalg.norm(vector)
    place = {"frac": 0.5, "phrase": "red dog", "head": "dog", "start": 2, "end": 9, "nature": "living"}
    row = {
        **dict.fromkeys(CROPS.names),
        **place,
        "clip_id": clip,
        "clip_source": "film",
        "source_uri": "film.mp4",
        "start_s": span[0],
        "end_s": span[1],
        "image": jpeg(draw_frame(int(span[0]))),
        "vector": unit.tolist(),
        "score": 1.0,
        "status": "ok",
        **values,
    }
    return row | {"crop_id": crop_id(clip, row["doc_id"], row["start"], row["frac"])}


BOUNDS: tuple[float, float] = InstructConfig.model_fields["similarity"].default


def test_a_reference_is_like_enough_unlike_enough_and_from_elsewhere():
    target = crop("a", (0, 2), [1, 0])
    bank = [
        target,
        crop("b", (2, 4), [1, 0.4]),  # .93
        crop("c", (1, 3), [1, 0.4]),  # overlaps
        crop("d", (4, 6), [1, 0.01]),  # a copy
        crop("e", (6, 8), [1, 0.9]),  # .74: as like as two dogs are
        crop("f", (8, 9), [1, 0.4], clip_source="other film"),
        crop("g", (8, 9), [1, 0.4], head="cat"),
        crop("a", (0, 2), [1, 0.3], doc_id="doc"),  # .96, but it lives
    ]
    compared = cross_references(target, bank, BOUNDS, at_most=2)
    fates = {pair.reference["clip_id"]: pair.fate for pair in compared}
    assert fates == {"b": "used", "d": "near_duplicate", "e": "too_unlike"}
    ball = crop("a", (0, 2), [1, 0], nature="product")
    documents = [crop("a", (0, 0), [1, 0.3], nature="product", doc_id="doc")]
    assert [pair.fate for pair in cross_references(ball, documents, BOUNDS, at_most=2)] == ["used"]


def test_a_living_thing_of_the_same_film_must_be_as_like_as_a_document():
    for nature, span, values in [("living", (2, 4), {}), ("product", (0, 0), {"doc_id": "doc"})]:
        target = crop("a", (0, 2), [1, 0], nature=nature)
        other = [
            crop("a" if values else "b", span, [1, y], nature=nature, frac=y, **values) for y in (0.4, 0.9)
        ]
        compared = cross_references(target, other, BOUNDS, at_most=2)
        assert [pair.fate for pair in compared] == ["used", "too_unlike"]  # .93 and .74


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.floats(-1, 1)), max_size=12), st.integers(1, 3)
)
def test_used_references_lie_between_the_bounds_and_share_no_moment(
    others: list[tuple[int, int, float]], at_most: int
):
    target = crop("t", (3, 5), [1, 0])
    bank = [crop(f"c{i}", (a, a + n), [1, y]) for i, (a, n, y) in enumerate(others)]
    compared = cross_references(target, bank, BOUNDS, at_most=at_most)
    used = [pair for pair in compared if pair.fate == "used"]
    assert len(used) <= at_most
    for pair in used:
        assert BOUNDS[0] <= pair.similarity <= BOUNDS[1] and disjoint(target, pair.reference)
    assert len(compared) == sum(disjoint(target, other) for other in bank)
    assert sum(histogram([pair.similarity for pair in compared])) == len(compared)


def test_pictures_of_one_source_are_one_picture_and_no_cross_pair():
    picture = crop("a", (0, 0), [1, 0])
    for other in [crop("b", (0, 0), [1, 0.4]), crop("b", (0, 0), [1, 0.4], end_s=None)]:
        assert not disjoint(picture, other) and not disjoint(other, picture)
        assert not cross_references(picture, [other], BOUNDS, at_most=1)


def test_several_references_of_a_word_are_of_several_clips():
    target = crop("a", (0, 2), [1, 0])
    still = [crop("b", (2, 4), [1, 0.4], frac=frac) for frac in (0.05, 0.5, 0.95)]
    bank = [*still, crop("c", (4, 6), [1, 0.45])]
    used = [pair.reference for pair in cross_references(target, bank, BOUNDS, at_most=3) if pair.fate == "used"]
    assert [reference["clip_id"] for reference in used] == ["b", "c"]


def test_a_picture_has_one_frame_and_so_one_cut_out_of_a_word(tmp_path: Path):
    Image.fromarray(draw_frame(3)).save(tmp_path / "ball.png")
    row = prompt(0, tmp_path / "ball.png", "A red ball in the grass", media="image")
    finder = SubjectFinder(SubjectConfig(clip=ClipConfig(name="offline")))
    made = clip_crops(row, finder, np.random.default_rng(0), local_uri=None)
    assert [(crop["phrase"], crop["frac"]) for crop in made] == [("red ball", 0.0), ("grass", 0.0)]


class Broken:
    """A finder that can't take this frame: transformers refuses pictures of one pixel so."""

    def find(self, frames: Any, phrases: Any) -> Any:
        raise ValueError("Unable to infer channel dimension format")


def test_a_clip_or_document_that_breaks_the_finder_is_one_bad_row(ball: Path, tmp_path: Path):
    config = CropsConfig(prompts=save_prompts(tmp_path / "p", [prompt(0, ball, "A red ball")]), out="o")
    worker = CropsWorker(config.model_copy(update={"subjects": SUBJECTS}))
    worker.finder.__dict__["finder"] = Broken()
    row = prompt(0, ball, "A red ball")
    row["segments"][0]["text"] = "a blue ball"
    made = worker.crops(row, None)
    assert [(crop["doc_id"], crop["status"]) for crop in made] == [(None, "bad_row"), ("d0-1", "bad_row")]
    assert all(crop["error"] == "ValueError: Unable to infer channel dimension format" for crop in made)


def test_crops_of_a_targets_own_small_frames_say_so_in_the_instruction(ball: Path, tmp_path: Path):
    finder, rows = SubjectFinder(SUBJECTS), []
    for source in (ball, tmp_path / "gone.mp4"):
        row = prompt(0, source, "A red ball in the grass")
        row["target"] |= {"data": np.stack([draw_frame(i) for i in range(4)]).tobytes()}
        row["target"] |= {"height_px": 180, "width_px": 320}
        own = clip_crops(row, finder, np.random.default_rng(0), local_uri=None)
        choice = Choice(own, 3, 1.0, "in_pair", BOUNDS, references=1)
        rows.append(RECIPES[Task.SUBJECT_DRIVEN].make(Draw(row, None, finder, 0, choice)))
    assert [flags for _, flags in rows] == [[], ["frames_from_target"]]


def test_a_prompt_has_no_more_pictures_than_the_generator_sees():
    assert MAX_PICTURES == MAX_REFERENCES
    caption = "A red dog, a black cat and a white horse run in the park."
    places = {e.head: e for e in find_entities(caption)}
    own = [
        crop("a", (0, 2), [1, 0], frac=frac, phrase=e.text, head=e.head, start=e.start, end=e.end)
        for e in places.values()
        for frac in ((0.05, 0.5, 0.95) if e.head != "park" else (0.05,))
    ]
    for one in own:
        one["nature"] = "place" if one["head"] == "park" else "living"
    row = {"clip_id": "a", "caption": caption}
    counts = Counter()
    for seed in range(20):
        choice = Choice(own, 3, 1.0, "in_pair", BOUNDS, references=3)
        draw = Draw(row, None, SubjectFinder(SUBJECTS), seed, choice)
        segments, _ = RECIPES[Task.SUBJECT_DRIVEN].make(draw)
        counts[sum(s["type"] == "image" for s in segments)] += 1
        assert sum(s["role"] == Role.BACKGROUND for s in segments) == 1
        assert "".join(s["text"] or "" for s in segments) == caption
    assert max(counts) == MAX_PICTURES and len(counts) > 2
    assert [len(some) for some in thinned([own[:3], own[:1], own[:3]], 5)] == [2, 1, 2]


def test_a_held_out_clip_is_no_training_clips_reference():
    train, test = crop("a", (0, 2), [1, 0], split="train"), crop("b", (2, 4), [1, 0.4], split="test")
    assert not cross_references(train, [test], BOUNDS, at_most=1)
    assert cross_references(test, [train], BOUNDS, at_most=1)
    assert cross_references(test, [crop("c", (4, 6), [1, 0.4], split="test")], BOUNDS, at_most=1)


def test_comparisons_are_all_counted_and_few_are_kept():
    film = [crop(f"c{n}", (n, n + 1), [1, n / 20]) for n in range(60)]
    tally = Tally()
    for target in film:
        tally.add(cross_references(target, film, BOUNDS, at_most=3))
    assert tally.fates.total() == sum(tally.similarities) == 60 * 59
    assert set(tally.fates) == {"used", "spare", "near_duplicate", "too_unlike"}
    kept = Counter(pair.fate for pair in tally.kept)
    assert kept["used"] == tally.fates["used"] and len(tally.kept) <= 60 * (3 + 3 * NUM_LOOKED_AT)


def save_crops(
    folder: Path, prompts: str, rows: list[dict[str, Any]], *, clip: str | None = "offline", more: int = 0
) -> str:
    """A certified table; `more` shards hold the crops of another film."""
    folder.mkdir(parents=True)
    entry = write_shard(f"{folder}/{shard_name(0)}", rows, CROPS, row_group_rows=2)
    places, files = places_of(rows, shard_name(0), row_group_rows=2), [entry]
    for number in range(1, more + 1):
        others = [crop(f"other {number}", (0, 1), [1, 0], clip_source="other film")]
        files.append(write_shard(f"{folder}/{shard_name(number)}", others, CROPS))
        places += places_of(others, shard_name(number), row_group_rows=2)
    files.append(write_shard(f"{folder}/{PLACES_FILE}", places, CROP_PLACES))
    inputs = {"prompts": ShardSet(prompts).certificate.content_hash()}
    n = len(rows)
    facts = {"clip": clip, "clips": n, "clips_with_a_picture": n, "reasons": {}}
    done = Certificate(
        job="subjects", config_hash="x", num_in=n, num_out=n, files=files, inputs=inputs, facts=facts
    )
    write_certificate(str(folder), done)
    return str(folder)


@pytest.fixture(scope="module")
def film(ball: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Prompts of three clips of one film, and their crops: one dog twice, and a copy of the first."""
    folder = tmp_path_factory.mktemp("film")
    rows: list[dict[str, Any]] = [
        prompt(i, ball, "A red dog is running") | {"start_s": 0.5 * i, "end_s": 0.5 * i + 0.5} for i in range(3)
    ]
    prompts = save_prompts(folder / "prompts", rows)
    vectors = [[1, 0], [1, 0.4], [1, 0.01]]
    spans = [(float(row["start_s"]), float(row["end_s"])) for row in rows]
    crops = [
        crop(str(row["clip_id"]), span, vector, clip_source=str(ball), image=jpeg(draw_frame(7 * n)))
        for n, (row, span, vector) in enumerate(zip(rows, spans, vectors, strict=True))
    ]
    return prompts, save_crops(folder / "crops", prompts, crops)


@pytest.mark.ray
def test_a_cross_pair_shows_the_other_clip_and_the_page_can_tell_how_like_it_is(
    film: tuple[str, str], ray_cluster: None, tmp_path: Path
):
    prompts, crops = film
    tasks = (Task.SUBJECT_DRIVEN,)
    config = InstructConfig(
        prompts=prompts, out=str(tmp_path / "x"), crops=crops, pairs="cross_clip", tasks=tasks, ray=RAY
    )
    certificate = run(config)
    pictures = {row["clip_id"]: row["image"] for row in read_table(Path(crops))}
    pairs = pq.read_table(tmp_path / "x" / "pairs.parquet").to_pylist()
    assert Counter(pair["fate"] for pair in pairs) == certificate.facts["pairs"]
    assert certificate.facts["pairs"] == {"near_duplicate": 2, "used": 4}
    for row in read_rows(tmp_path / "x"):
        shown = [s["image"] for s in row["segments"] if s["role"] == Role.SUBJECT]
        assert shown and pictures[row["clip_id"]] not in shown
        assert "".join(s["text"] or "" for s in row["segments"][1:]) == row["caption"]


@pytest.mark.parametrize("pairs", ["cross_clip", "mixed"])
def test_cross_pairs_of_crops_without_vectors_are_refused(
    crops: Path, prompts: str, pairs: Any, tmp_path: Path
):
    config = InstructConfig(prompts=prompts, out=str(tmp_path / "x"), crops=str(crops), pairs=pairs)
    with pytest.raises(ConfigError, match=r"holds no CLIP vectors.*pairs=in_pair.*--clip offline"):
        check(config)
    check(config.model_copy(update={"pairs": "in_pair"}))


@pytest.mark.ray
def test_bounds_of_another_clip_than_the_crops_are_remarked(
    film: tuple[str, str], ray_cluster: None, tmp_path: Path
):
    prompts, crops = film
    table = save_crops(tmp_path / "crops", prompts, read_table(Path(crops)), clip="ViT-B-32")
    tasks, out = (Task.SUBJECT_DRIVEN,), str(tmp_path / "x")
    config = InstructConfig(prompts=prompts, out=out, crops=table, pairs="mixed", tasks=tasks, ray=RAY)
    remarks = run(config).facts["remarks"]
    assert len(remarks) == 2 and "ViT-B-32" in remarks[1] and "the bounds similarity" in remarks[1]
    set_by_hand = {"similarity": (0.7, 0.9), "out": str(tmp_path / "y")}
    assert len(run(config.model_copy(update=set_by_hand)).facts["remarks"]) == 1


@pytest.mark.ray
@pytest.mark.parametrize("pairs", ["in_pair", "cross_clip"])
def test_crops_of_other_films_are_not_opened(
    film: tuple[str, str], pairs: Any, ray_cluster: None, tmp_path: Path
):
    prompts, crops = film
    table = save_crops(tmp_path / "crops", prompts, read_table(Path(crops)), more=2)
    for number in (1, 2):
        (tmp_path / "crops" / shard_name(number)).write_bytes(b"never read")
    tasks, out = (Task.SUBJECT_DRIVEN,), str(tmp_path / "x")
    made = run(InstructConfig(prompts=prompts, out=out, crops=table, pairs=pairs, tasks=tasks, ray=RAY))
    assert made.num_out == 3


@pytest.mark.ray
def test_mixed_pairs_fall_back_on_the_clip_itself(film: tuple[str, str], ray_cluster: None, tmp_path: Path):
    prompts, crops = film
    certificate = run(
        InstructConfig(
            prompts=prompts,
            out=str(tmp_path / "x"),
            crops=crops,
            pairs="mixed",
            similarity=(0.999, 1.0),
            tasks=(Task.SUBJECT_DRIVEN,),
            ray=RAY,
        )
    )
    pictures = {row["clip_id"]: row["image"] for row in read_table(Path(crops))}
    assert certificate.num_out == 3
    alone = [row for row in read_rows(tmp_path / "x") if row["start_s"] == 0.5]
    assert [s["image"] for s in alone[0]["segments"] if s["role"] == Role.SUBJECT] == [
        pictures[alone[0]["clip_id"]]
    ]


def test_cross_pairs_without_their_table_are_refused_with_the_command(
    film: tuple[str, str], prompts: str, tmp_path: Path
):
    own, crops = film
    with pytest.raises(ConfigError, match="vimi-data subjects"):
        check(InstructConfig(prompts=own, out=str(tmp_path / "x"), pairs="cross_clip"))
    with pytest.raises(ConfigError, match="other prompts"):
        check(InstructConfig(prompts=prompts, out=str(tmp_path / "x"), crops=crops))
    with pytest.raises(ConfigError, match="vimi-data subjects"):
        check(InstructConfig(prompts=own, out=str(tmp_path / "x"), crops=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="least <= greatest"):
        InstructConfig.load(overrides=["prompts=p", "out=o", "similarity=[0.9, 0.1]"])


@pytest.mark.ray
def test_the_page_shows_crops_by_verdict_pairs_with_their_similarity_and_a_funnel(
    film: tuple[str, str], crops: Path, prompts: str, ray_cluster: None, tmp_path: Path
):
    own, table = film
    out = str(tmp_path / "x")
    run(
        InstructConfig(
            prompts=own, out=out, crops=table, pairs="cross_clip", tasks=(Task.SUBJECT_DRIVEN,), ray=RAY
        )
    )
    config = ReportConfig(out=str(tmp_path / "a.html"), crops=table, instructions=out)
    page = Path(make_page(config)).read_text(encoding="utf-8")
    assert "Cross-pairs" in page and "red dog · 0.93" in page and "Near-duplicates, left out" in page
    config = ReportConfig(out=str(tmp_path / "b.html"), crops=str(crops), prompts=prompts)
    page = Path(make_page(config)).read_text(encoding="utf-8")
    rows = [row for row in read_table(crops) if row["error"]]
    reasons = {row["error"] if row["status"] == "filtered_no_subject" else row["status"] for row in rows}
    assert "gone.mp4" not in page.partition('id="subjects"')[2] and "not_found" in reasons
    assert len(reasons) >= 2 and all(html.escape(reason.capitalize()) in page for reason in reasons)
    assert "a word is surely shown" in page and 'id="subjects"' in page


@pytest.mark.ray
def test_the_page_of_instructions_without_subjects_has_no_cross_pairs_whatever_pairs_says(
    prompts: str, ray_cluster: None, tmp_path: Path
):
    out, tasks = str(tmp_path / "x"), (Task.VIDEO_PREDICTION,)
    made = run(InstructConfig(prompts=prompts, out=out, pairs="cross_clip", tasks=tasks, ray=RAY))
    assert made.num_out and not (tmp_path / "x" / "pairs.parquet").exists()
    page = make_page(ReportConfig(out=str(tmp_path / "a.html"), instructions=out))
    assert "Cross-pairs" not in Path(page).read_text(encoding="utf-8")


@pytest.mark.ray
def test_the_page_shows_the_funnel_of_instructions_without_a_table_of_crops(
    prompts: str, ray_cluster: None, tmp_path: Path
):
    for task, is_shown in [(Task.SUBJECT_DRIVEN, True), (Task.TEXT_TO_VIDEO, False)]:
        out = str(tmp_path / task)
        run(InstructConfig(prompts=prompts, out=out, subjects=SUBJECTS, tasks=(task,), ray=RAY))
        config = ReportConfig(out=str(tmp_path / f"{task}.html"), prompts=prompts, instructions=out)
        page = Path(make_page(config)).read_text(encoding="utf-8")
        assert ("subject-driven instructions" in page) == is_shown == ('id="subjects"' in page)
