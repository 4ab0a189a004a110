"""`vimi-train evaluate` from words to scores.json: the same bytes however it comes about."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli import evaluate as module
from cli import train
from cli.evaluate import EvaluateConfig, check, run
from infra.errors import ConfigError
from infra.storage import read_json
from model.sampling import generate
from model.sampling.plan import SampleConfig
from model.training.config import Stage1Config
from pipeline.evaluate.worker import EvaluateWorker
from pipeline.report import ReportConfig
from pipeline.report import run as make_page
from pipeline.report.scores import system_in_words
from tests.pipeline.conftest import WriteVideo

ROOT = Path(__file__).resolve().parents[2]
METRICS = ["clip_t", "clip_i", "copy_guard", "consistency", "flicker", "frozen", "clip_fid"]


@pytest.fixture
def folders(tmp_path: Path, write_video: WriteVideo, write_sound: WriteVideo) -> Path:
    for n in range(5):
        write_video(tmp_path / "real" / f"r{n}.mp4", num_frames=5, seed=n)
        write_video(tmp_path / "ours" / f"v{n}.mp4", num_frames=5, seed=n + 3)
    (tmp_path / "ours" / "broken.mp4").write_bytes(b"nothing")
    write_sound(tmp_path / "ours" / "sound.m4a")
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "ours" / "dog.png")
    lines = [
        {"video": f"v{n}.mp4", "prompt": f"Film {n} of a <image>.", "images": ["dog.png"]} for n in range(5)
    ]
    (tmp_path / "ours" / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def config(folders: Path, encoder: dict[str, Any], **changes: Any) -> EvaluateConfig:
    values = {
        "videos": str(folders / "ours"),
        "against": str(folders / "real"),
        "out": str(folders / "scores"),
        "metrics": METRICS,
        "allow_small_n": True,
        "frames": {"num_frames": 4},
        "networks": {"clip": encoder["clip"]},
        "cache": str(folders / "cache"),
    }
    return EvaluateConfig.model_validate(values | changes)


@pytest.mark.ray
def test_scores_are_the_same_bytes_after_a_kill_for_any_workers_and_from_the_cache(
    folders: Path,
    tiny_encoder: dict[str, Any],
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate = run(config(folders, tiny_encoder, num_workers=1))
    assert certificate.num_in == 12 and certificate.num_out == 10
    assert certificate.dead == {"no_video": 1, "undecodable": 1}
    whole = (folders / "scores" / "scores.json").read_bytes()
    values = json.loads(whole)
    assert set(values["scores"]) == set(METRICS) and not values["not_computed"]
    assert [row["name"] for row in values["failed"]] == ["broken.mp4", "sound.m4a"]
    fid = values["scores"]["clip_fid"]
    assert (fid["n"], fid["n_real"], fid["failed"], fid["failed_real"]) == (5, 5, 2, 0) and fid["small_n"]
    assert fid["manifest"]["networks"]["clip"]["weight_hash"] and str(folders) not in whole.decode()

    # Killed before the scores, with journals torn off in the middle: other workers go on with an empty cache.
    other = config(
        folders, tiny_encoder, out=str(folders / "more"), cache=str(folders / "cache2"), num_workers=2
    )
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(other)
    for journal in (folders / "more" / "journal").iterdir():
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:1]) + lines[-1][:20])
    run(other)
    assert (folders / "more" / "scores.json").read_bytes() == whole

    # Of real videos only what a metric compares is looked at.
    real = [payload["features"] for side, payload in module.make_plan(other).payloads if side == "real"]
    assert real == [["clip"]] * 5
    alone = module.make_plan(config(folders, tiny_encoder, metrics=["flicker"]))
    assert set(alone.videos) == set(alone.inputs) == {"sampled"}

    # The page holds both in one table, since their protocol is one.
    report = ReportConfig(
        out=str(folders / "page.html"), scores=(str(folders / "scores"), str(folders / "more"))
    )
    page = Path(make_page(report)).read_text()
    assert page.count('<th scope="row">more<') == len(METRICS) == page.count("<summary>manifest of scores<")
    assert "sound.m4a: no_video" in page and "best clip_t" in page and "Film 3 of a" in page
    assert page.count('alt="reference picture"') and "Published, other protocol" in page

    # A second evaluation of the same videos decodes nothing.
    with monkeypatch.context() as patch:
        patch.setattr(EvaluateWorker, "_frames", lambda *_: 1 / 0)
        worker = EvaluateWorker(lambda: module.make_extractor(other, ["clip"], "cpu"), other.frames, 60)
        assert worker(module.make_plan(other).units[-1].payload)["status"] == "ok"


@pytest.mark.ray
def test_a_runs_videos_are_sampled_on_all_workers_and_scored_against_its_prompts_targets(
    tmp_path: Path,
    trained_run: Stage1Config,
    tiny_encoder: dict[str, Any],
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(out: str, **changes: Any) -> EvaluateConfig:
        values = {
            "run": trained_run.out,
            "prompts": trained_run.prompts,
            "rows": 5,
            "videos": None,
            "against": None,
        }
        values |= {"sample": {"num_steps": 2}, "metrics": ["flicker", "clip_t", "clip_fid"]}
        return config(tmp_path, tiny_encoder, **values | {"out": str(tmp_path / out)} | changes)

    assert "5 sampled videos\n5 real videos\nto sample: 5 videos of 4 frames" in check(asked("a"))
    run(asked("a", num_workers=1))
    whole = (tmp_path / "a" / "scores.json").read_bytes()
    fid = json.loads(whole)["scores"]["clip_fid"]
    assert (fid["n"], fid["n_real"]) == (5, 5) and fid["manifest"]["system"]["num_steps"] == 2
    assert fid["manifest"]["system"]["prompts_with_documents"] == 5

    with monkeypatch.context() as patch:  # killed between two videos, and the last one torn
        patch.setattr(generate, "certify", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(asked("b", num_workers=2))
    journals = sorted((tmp_path / "b" / "journal").iterdir())
    journals[0].unlink()
    journals[1].write_bytes(journals[1].read_bytes()[:30])
    run(asked("b", num_workers=2))
    assert (tmp_path / "b" / "scores.json").read_bytes() == whole
    for video in (tmp_path / "a" / "videos").iterdir():
        if video.suffix != ".json":
            assert video.read_bytes() == (tmp_path / "b" / "videos" / video.name).read_bytes()

    with pytest.raises(ConfigError, match=r"videos of 4 frames, of which the first 7.*num_frames=4"):
        check(asked("c", frames={"num_frames": 4, "stride": 2}))
    with pytest.raises(ConfigError, match="a run and videos"):
        check(asked("c", videos=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"unknown key 'num_step'.*'num_steps'"):
        check(asked("c", sample={"num_step": 2}))


@pytest.mark.ray
def test_a_set_against_itself_is_at_no_distance(
    folders: Path,
    tiny_encoder: dict[str, Any],
    ray_cluster: None,
) -> None:
    same = str(folders / "real")
    run(config(folders, tiny_encoder, videos=same, against=same, metrics=["clip_fid"]))
    assert read_json(str(folders / "scores" / "scores.json"))["scores"]["clip_fid"]["value"] < 1e-9


def test_a_dry_run_says_what_is_needed_and_where_it_comes_from(folders: Path) -> None:
    words = ["evaluate", "--videos", str(folders / "ours"), "--out", str(folders / "x"), "--dry-run",
             "--set", "networks.clip.name=offline", "--metrics", "clip_t,fvd,fid,flicker"]  # fmt: skip
    done = CliRunner().invoke(train.app, words)
    assert done.exit_code == 0, done.output
    assert "7 sampled videos" in done.output and "clip_t: CLIP offline" in done.output
    assert "not fvd: needs real videos; cure: --against" in done.output
    assert not (folders / "x").exists()


def test_refusals_are_a_line_each(folders: Path, tiny_encoder: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"7 sampled and 5 real videos for clip_fid.*--allow-small-n"):
        check(config(folders, tiny_encoder, allow_small_n=False))
    with pytest.raises(ConfigError, match="no metric fvdd"):
        check(config(folders, tiny_encoder, metrics=["fvdd"]))
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        check(config(folders, tiny_encoder, videos=None))
    with pytest.raises(ConfigError, match="prompts and sample with videos that are there already"):
        check(config(folders, tiny_encoder, prompts=str(folders), sample={"num_steps": 2}))
    with pytest.raises(ConfigError, match="fid: no inception weights"):
        check(config(folders, tiny_encoder, metrics=["fid"]))
    with pytest.raises(ConfigError, match="no video in"):
        check(config(folders, tiny_encoder, against=str(folders / "gone")))


def test_videos_of_sample_bring_what_made_them_into_the_manifest(
    tmp_path: Path, trained_run: Stage1Config, tiny_encoder: dict[str, Any]
) -> None:
    guidance = {"scheme": "cfg", "weight": 2.0}
    fields = {"run": trained_run.out, "out": str(tmp_path / "videos"), "prompts": ["a dog"], "num_steps": 2}
    generate.run(SampleConfig.load(options={**fields, "seeds": [3, 5], "guidance": guidance}))
    told = {"videos": fields["out"], "against": None, "metrics": ["flicker"]}
    system = module.make_plan(config(tmp_path, tiny_encoder, **told)).system
    expected = {"run": "run", "num_steps": 2, "guidance": "cfg 2", "seeds": [3, 5], "ema": "weights"}
    assert {name: system[name] for name in expected} == expected
    asked = {"run": trained_run.out, "videos": None, "against": None, "metrics": ["flicker"]}
    asked |= {"prompts": trained_run.prompts, "rows": 2, "sample": {"num_steps": 2}}
    of_run = module.make_plan(config(tmp_path, tiny_encoder, **asked)).system
    same = ("run", "position", "checkpoint", "ema", "documents", "files")
    assert {name: system[name] for name in same} == {name: of_run[name] for name in same}
    assert str(tmp_path) not in json.dumps(system)
    assert system_in_words(system).endswith("2 steps, weights, guidance cfg 2, seeds 3, 5")


def test_prompts_of_real_videos_are_left_alone(folders: Path, tiny_encoder: dict[str, Any]) -> None:
    line = {"video": "r0.mp4", "prompt": "A <image>.", "images": ["gone.png"]}
    (folders / "real" / "prompts.jsonl").write_text(json.dumps(line))
    plan = module.make_plan(config(folders, tiny_encoder, metrics=["clip_fid"]))
    assert [payload["prompt"] for payload in plan.videos["real"]] == [None] * 5
    extractor = module.make_extractor(config(folders, tiny_encoder), plan.features, "cpu")
    assert not extractor.reads_pictures  # nor those of sampled ones, of which no metric asks for any


def test_defaults_that_few_videos_cannot_have_are_left_out(folders: Path, tiny_encoder: dict[str, Any]) -> None:
    (folders / "i3d.ckpt").write_bytes(b"weights")  # a plan doesn't load them
    networks = {"clip": tiny_encoder["clip"], "i3d": str(folders / "i3d.ckpt")}
    changes = {"metrics": None, "allow_small_n": False, "frames": {"num_frames": 9}, "networks": networks}
    few = config(folders, tiny_encoder, **changes)
    plan = module.make_plan(few)
    assert {"flicker", "clip_t"} <= set(plan.metrics) and "is_i3d" not in plan.metrics
    assert "7 sampled videos, and its value depends on n" in plan.obstacles["is_i3d"]
    with pytest.raises(ConfigError, match="for is_i3d, whose value depends on n"):
        check(few.model_copy(update={"metrics": ("is_i3d", "flicker")}))


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(tmp_path: Path, write_video: WriteVideo) -> None:
    for n in range(120):
        write_video(tmp_path / "videos" / f"v{n:03d}.mp4", num_frames=16, size_px=(240, 320), seed=n % 4)

    def start(out: str) -> subprocess.Popen[bytes]:
        words = ["evaluate", "--videos", str(tmp_path / "videos"), "--out", str(tmp_path / out)]
        words += [
            "--metrics",
            "flicker,frozen",
            "--set",
            f"cache={tmp_path / out}-cache",
            "--set",
            "num_workers=1",
        ]
        code = "from cli.train import main; main()"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", code, *words], cwd=tmp_path, env=environment)

    assert start("whole").wait(300) == 0
    killed, journal = start("killed"), tmp_path / "killed" / "journal"
    while not any(file.read_bytes().count(b"\n") for file in journal.glob("*.jsonl")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "scores.json").exists()
    assert start("killed").wait(300) == 0
    for name in ("scores.json", "videos.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
