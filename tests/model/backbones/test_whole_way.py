"""From a pretrained model to a page and an export by the commands that a user types."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli import data, train
from infra.run_folder import RunFolder
from infra.storage import read_json

SAMPLING = {"num_steps": 2, "guidance": {"weight": 2}}
METRICS = "flicker,clip_t,clip_fid"


def typed(*words: str) -> str:
    """What a command says; vimi-data's report, or one of vimi-train."""
    found = CliRunner().invoke(data.app if words[0] == "report" else train.app, list(words))
    assert found.exit_code == 0, (words, found.output, found.exception)
    return found.output


def stage(folder: Path, name: str, values: dict[str, Any]) -> str:
    """Train one; its folder."""
    config = folder / f"{name}.yaml"
    config.write_text(
        yaml.safe_dump(json.loads(json.dumps({**values, "out": str(folder / name)}, default=list)))
    )
    typed(name, "--config", str(config), "--dry-run")
    said = typed(name, "--config", str(config))
    assert "vimi-train sample" in said
    return str(folder / name)


@pytest.mark.slow
@pytest.mark.ray
def test_a_pretrained_model_goes_through_both_stages_scores_report_and_export(
    base_values: Callable[..., dict[str, Any]],
    make_shards: Any,
    make_row: Any,
    tiny_encoder: dict[str, Any],
    wan: str,
    tmp_path: Path,
    ray_cluster: None,
) -> None:
    networks = {"clip": tiny_encoder["clip"]}
    scored = {"metrics": ["flicker", "clip_t"], "metrics_videos": 4, "networks": networks}
    validation = {"num_samples": 2, "held_out_frac": 0, **scored}
    values = base_values(samples=4, validation=validation, preview_every_samples=None)
    one = stage(tmp_path, "stage1", values)
    tasks = ("subject_driven", "video_prediction")
    rows = [make_row(n, task=tasks[n % 2], num_frames=5, height=32, width=48) for n in range(12)]
    prompts = str(make_shards(rows=rows, name="instructions", job="instruct"))
    of_two = {"prompts": prompts, "start_from": one, "tasks": dict.fromkeys(tasks, 1.0)}
    two = stage(tmp_path, "stage2", {**values, **of_two})
    for run in (one, two):
        records = RunFolder(run).records()
        assert any("score/clip_t n4" in record for record in records)
        assert any("val/video none - right q0.9" in record for record in records)
    folders = {name: str(tmp_path / name) for name in ("samples", "scores", "base_scores", "export")}
    page = tmp_path / "page.html"
    typed("sample", two, "a dog runs", "--out", folders["samples"], "--steps", "2")
    sets = {"rows": 4, "frames.num_frames": 5, "networks": json.dumps(networks),
            "sample": json.dumps(SAMPLING), "cache": tmp_path / "cache"}  # fmt: skip
    more = ["--prompts", prompts, "--metrics", METRICS, "--allow-small-n"]
    more += [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    typed("evaluate", two, "--out", folders["scores"], *more)
    size = ["--set", "sample.size_px=[32,48]", "--set", "sample.num_frames=5"]
    typed("evaluate", "--base", wan, "--out", folders["base_scores"], *more, *size)
    for name in ("scores", "base_scores"):
        found = read_json(str(Path(folders[name]) / "scores.json"))["scores"]
        assert set(found) == set(METRICS.split(",")) and all(score["n"] == 4 for score in found.values())
    typed("report", "--run", one, "--run", two, "--samples", folders["samples"],
          "--scores", folders["scores"], "--scores", folders["base_scores"], "--out", str(page))  # fmt: skip
    assert "a dog runs" in page.read_text() and "clip_fid" in page.read_text()
    typed("export", two, "--out", folders["export"])
    assert (tmp_path / "export/pytorch_lora_weights.safetensors").is_file()
