"""Laws of the evidence: true videos prove the claims, others' videos fail them, and the page shows both."""

import html.parser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra.certificate import Certificate, entry_of, write_certificate
from infra.errors import ConfigError, DataError
from infra.run_folder import record_line
from infra.samples import write_samples
from infra.storage import join, read_json, write_bytes, write_json
from model.sampling.film import write_video
from pipeline.media.frames import decode_frames
from pipeline.report import ReportConfig
from pipeline.report.page import NUM_STRIPS
from pipeline.report.page import run as report
from pipeline.world.evidence import (
    EvidenceConfig,
    SampleSet,
    World,
    check,
    compare,
    film_strips,
    judge_set,
    read_prompts,
    run,
    table,
)
from pipeline.world.judge import judge_video
from pipeline.world.make import WorldConfig
from pipeline.world.make import run as make_world
from tests.model.prompt_tables import jpeg, prompt_row, write_shards

SIDE, COUNT = 16, 10
TIMES_S = [(frame + 0.5) / 6 for frame in range(4)]
"""Of the four frames of a clip."""


@dataclass(frozen=True)
class Made:
    """A world, prompts for its held-out clips, and three sets of videos."""

    folder: Path
    config: dict[str, Any]


def write_set(
    folder: Path, rows: list[dict[str, Any]], videos: list[np.ndarray], prompts: str
) -> dict[str, str]:
    """What `vimi-train sample` leaves: videos enlarged to be looked at, samples.json, certificate."""
    entries, files = [], []
    for number, (row, frames) in enumerate(zip(rows, videos, strict=True)):
        said, made = write_video(str(folder), f"sample-{number:03d}", frames, 6.0)
        files += [entry_of(*file) for file in made.items()]
        entries.append({"prompt_id": row["prompt_id"], "seed": 0, "fps": 6.0, **said})
    write_samples(str(folder), entries)
    count = len(entries)
    certificate = Certificate(job="sample", config_hash="0", num_in=count, num_out=count, files=files)
    write_certificate(folder, certificate)
    return {"samples": str(folder), "prompts": str(folder.parent / prompts)}


def make_judged(folder: Path, count: int, *, prompts: str = "prompts") -> Made:
    """A world of `count` unseen nouns, prompts for them, their true videos, those of others and grey ones."""
    world = folder / "world"
    make_world(WorldConfig(out=str(world), nouns=1, unseen=count, distractors=0, seed=7))
    rows, videos = [], []
    for number, row in enumerate(pq.read_table(world / "concepts.parquet").to_pylist()):
        if row["seen"]:
            continue
        (clip,) = row["clips"]
        frames = decode_frames(str(world / clip["video"]), TIMES_S, size_px=(SIDE, SIDE))
        prompt = prompt_row(number, num_frames=4, height=SIDE, width=SIDE)
        prompt["segments"][1]["image"] = jpeg(frames[0])
        target = {**prompt["target"], "data": frames.tobytes()}
        own = {"source_uri": str(world / clip["video"]), "split": "validation", "caption": clip["caption"]}
        rows.append({**prompt, **own, "target": target})
        videos.append(frames)
    write_shards(folder / prompts, rows, job="augment", group_rows=4, file_rows=16)
    sets = {
        "right": videos,
        "shuffled": [*videos[1:], videos[0]],
        "none": [np.full_like(frames, 120) for frames in videos],
    }
    made = {name: write_set(folder / name, rows, shown, prompts) for name, shown in sets.items()}
    return Made(folder, {"world": str(world), "out": str(folder / "out"), "sets": made})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_judged(tmp_path_factory.mktemp("evidence"), COUNT)


LOSSES = {
    "val/video documents right": 0.25,
    "val/video none - right": 0.125,
    "val/video documents right q0.9": 0.5,
    "val/video documents none q0.9": 0.75,
    "val/video none - right q0.9": 0.25,
    "val/video none - right q0.9 error": 0.0625,
    "val/video shuffled - right": 0.125,
    "val/video shuffled - right error": 0.125,
}


def write_run(folder: Path, numbers: dict[str, float]) -> None:
    """A run's record of one validation."""
    write_bytes(str(folder / "metrics.jsonl"), record_line({"samples": 64, **numbers}).encode())


def claim(**values: Any) -> dict[str, Any]:
    return {"words": "it <is> so", "measure": "colour", "of": "right", **values}


MEASURES = ("colour", "shape", "direction", "background", "pictures", "place")


@pytest.fixture(scope="module")
def rows(made: Made) -> dict[str, dict[str, Any]]:
    """Claims of all kinds, decided at once."""
    claims = [claim(words=f"true {m}", measure=m, at_least=1.0) for m in MEASURES]
    claims += [claim(words=f"other {m}", measure=m, against="shuffled", difference="more") for m in MEASURES]
    claims += [
        claim(words="worse is more", of="shuffled", against="right", difference="more"),
        claim(words="better is not more", against="none", difference="none"),
        claim(words="too few", of="none", at_least=0.9),
        claim(words="too many", at_most=0.5),
        claim(words="few <enough>", of="shuffled", at_most=0.5),
    ]
    write_run(made.folder / "stage1", {**LOSSES, "val/video rows": 64})
    stage1 = str(made.folder / "stage1")
    losses = [
        {"words": "rises without", "run": stage1, "against": "none", "quantile": 0.9},
        {"words": "does not rise", "run": stage1, "against": "none", "quantile": 0.9, "difference": "none"},
        {"words": "within errors", "run": stage1, "against": "shuffled", "difference": "none"},
    ]
    more = {"runs": [stage1], "losses": losses, "guidance": {1: "none", 2.5: "right"}}
    found = run(EvidenceConfig.model_validate({**made.config, **more, "claims": claims}))
    return {row["claim"]: row for row in found}


@pytest.mark.parametrize("measure", MEASURES)
def test_true_videos_are_right_and_more_often_than_others(rows: dict[str, Any], measure: str) -> None:
    row = rows[f"true {measure}"]
    assert row["holds"] and row["share"] == 1.0 and row["nouns"] == row["videos"] == COUNT
    row = rows[f"other {measure}"]
    assert row["holds"] == (row["difference"] > 2 * row["difference_error"])
    if measure in ("colour", "shape", "direction"):
        assert row["holds"] and row["other_share"] < 0.7


def test_only_the_first_frame_in_place_is_no_video_that_goes_on(made: Made) -> None:
    """The first frame may have been given: it tells nothing."""
    world = World(made.config["world"])
    for concept, clip in world.clips.values():
        frames = decode_frames(join(world.folder, clip["video"]), TIMES_S, size_px=(SIDE, SIDE))
        for after, goes_on in ((frames[1:], True), (np.roll(frames[1:], SIDE // 2, axis=2), False)):
            seen = judge_video(np.concatenate([frames[:1], after]), size=clip["size"], shapes=world.shapes)
            assert compare(seen, concept, clip)["place"] == goes_on


def test_a_set_of_other_prompts_leaves_its_strips_empty(made: Made) -> None:
    world, shards = World(made.config["world"]), read_prompts(made.config["sets"]["right"]["prompts"])
    right = judge_set(SampleSet(**made.config["sets"]["right"]), shards, world)
    for strip in film_strips([right, right[:1], right], shards)[1:]:
        first, other, last = strip["videos"]
        assert first["strip"] == last["strip"] is not None and other == {"strip": None, "right": []}


def test_a_claim_that_is_not_so_fails(rows: dict[str, Any]) -> None:
    for words in ("worse is more", "better is not more", "too few", "too many"):
        assert not rows[words]["holds"]
    assert rows["few <enough>"]["holds"]
    assert table([rows["too few"]]).startswith("  FAILS  too few: colour right 0.")


def test_a_claim_about_the_loss_is_decided_by_two_errors(rows: dict[str, Any]) -> None:
    assert rows["rises without"]["holds"] and rows["within errors"]["holds"]
    assert not rows["does not rise"]["holds"]
    told = "rises without: loss 0.500 at noise quantile 0.9; none +0.250 ± 0.062; 64 rows"
    assert told in table([rows["rises without"]])


def test_the_page_shows_claims_and_strips_and_fetches_nothing(made: Made, rows: dict[str, Any]) -> None:
    page = (made.folder / "out" / "evidence.html").read_text()
    found: list[tuple[str, dict[str, str | None]]] = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append((tag, dict(attrs)))
    parser.feed(page)
    policy = next(attrs for tag, attrs in found if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])
    assert not [tag for tag, _ in found if tag in ("script", "iframe", "video")]
    assert all(str(attrs["src"]).startswith("data:") for tag, attrs in found if tag == "img")
    assert page.count("frames of the sampled video") == 3 * COUNT
    assert "few &lt;enough&gt;" in page and "few <enough>" not in page
    holds = [row["holds"] for row in rows.values()]
    assert page.count('class="holds"') == holds.count(True)
    assert page.count('class="fails"') == holds.count(False)
    told = read_json(str(made.folder / "out" / "evidence.json"))
    assert [row["holds"] for row in told["claims"]] == holds
    assert told["sets"]["right"]["colour"] == {"share": 1.0, "error": 0.0}
    assert told["losses"] == {"stage1": LOSSES}
    assert "+0.2500 ± 0.0625" in page and "guidance weight" in page


def test_a_report_opens_with_what_was_judged_and_refuses_what_was_edited(
    made: Made, rows: dict[str, Any], tmp_path: Path
) -> None:
    config = ReportConfig(
        evidence=str(made.folder / "out"), runs=(str(made.folder / "stage1"),), out=str(tmp_path)
    )
    page = Path(report(config)).read_text()
    assert (
        page.index("frames of the sampled video")
        < page.index("few &lt;enough&gt;")
        < page.index('id="training"')
    )
    assert page.count("frames of the sampled video") == 3 * NUM_STRIPS
    assert page.count('class="holds"') == [row["holds"] for row in rows.values()].count(True)
    told = read_json(str(made.folder / "out" / "evidence.json"))
    told["claims"][0]["holds"] = not told["claims"][0]["holds"]
    (tmp_path / "edited").mkdir()
    write_json(str(tmp_path / "edited" / "evidence.json"), told)
    with pytest.raises(DataError, match="edited"):
        report(config.model_copy(update={"evidence": str(tmp_path / "edited")}))
    with pytest.raises(ConfigError, match="no evidence"):
        report(config.model_copy(update={"evidence": str(tmp_path)}))


def test_what_cannot_be_judged_is_refused(made: Made, tmp_path: Path) -> None:
    for wrong in (
        {"of": "best", "at_least": 1.0},
        {"against": "none"},
        {"difference": "more"},
        {},
        {"at_least": 2.0},
    ):
        with pytest.raises(ValueError):
            EvidenceConfig.model_validate({**made.config, "claims": [claim(**wrong)]})
    claims = [claim(at_least=1.0)]
    with pytest.raises(ValueError, match="set 'best'"):
        EvidenceConfig.model_validate({**made.config, "claims": claims, "guidance": {1: "best"}})
    write_certificate(tmp_path / "lost", Certificate(job="sample", config_hash="0", num_in=1, num_out=1))
    lost = {"right": {"samples": str(tmp_path / "lost"), "prompts": str(made.folder / "prompts")}}
    with pytest.raises(ConfigError, match="no samples in"):
        check(EvidenceConfig.model_validate({**made.config, "claims": claims, "sets": lost}))
    write_run(tmp_path / "run", {"loss": 1.0})
    with pytest.raises(ConfigError, match="no validation"):
        check(EvidenceConfig.model_validate({**made.config, "claims": claims, "runs": [str(tmp_path / "run")]}))
    loss = {"words": "so", "run": str(tmp_path / "unsure"), "against": "none"}
    with pytest.raises(ValueError, match="legal: none: give `runs`"):
        EvidenceConfig.model_validate({**made.config, "claims": claims, "losses": [loss]})
    write_run(tmp_path / "unsure", LOSSES)
    for unknown in ({"quantile": 0.5}, {}):  # no such level; no error of the mean
        with pytest.raises(ConfigError, match=r"quantile null or 0\.9"):
            config = {"runs": [loss["run"]], "losses": [loss | unknown]}
            check(EvidenceConfig.model_validate({**made.config, "claims": claims, **config}))
    for changes in ({"world": str(tmp_path)}, {"sets": {"right": {"samples": str(tmp_path), "prompts": "x"}}}):
        with pytest.raises(ConfigError):
            check(EvidenceConfig.model_validate({**made.config, **changes, "claims": claims}))
    with pytest.raises(DataError, match="no videos for the claim"):
        run(EvidenceConfig.model_validate({**made.config, "claims": [claim(at_least=0.1, task="none")]}))
