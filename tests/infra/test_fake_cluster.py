"""Clusters as shipped: a head without CPUs, no worker yet; jobs ask Ray for what they need, and say so."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.fake_cluster import ROOT, command, fake_cluster
from tests.model.runs import free_port
from tests.pipeline.conftest import write_video  # noqa: F401 # pyright: ignore[reportUnusedImport]

CODE = "from cli.data import main; main()"


def submit(there: dict[str, str], port: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, again while the head has no agent yet to take jobs."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--address", f"http://127.0.0.1:{port}", *words]
    tries = 30
    while True:
        result = subprocess.run(
            command, env=there, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
        )
        tries -= 1
        if not tries or "No available agent" not in result.stderr:
            return result
        time.sleep(2)


def corpus(folder: Path, write: Any) -> None:
    for number, noun in enumerate(("dog", "cat", "boat", "car")):
        path = write(folder / f"{number}.mp4", num_frames=12, fps=6, seed=number)
        path.with_suffix(".txt").write_text(f"a {noun} moves to the right")


STAGE1 = {
    "preset": "fit-tiny",
    "num_frames": 8,
    "height_px": 24,
    "width_px": 32,
    "reference_size_px": [24, 32],
    "reference_patch_px": 8,
    "backbone": {"num_blocks": 1, "layers_per_block": 1, "group_height": 3, "group_width": 2},
    "samples": 8,
    "batch_size": 2,
    "encoder": {"clip": {"name": "offline"}},
    "preview_every_samples": 0,
    "trackers": [],
}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_each_job_runs_on_a_cluster_that_starts_from_none(
    write_video: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    corpus(tmp_path / "videos", write_video)
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(STAGE1))
    sizes = [f"--set=target.{name}={STAGE1[name]}" for name in ("num_frames", "height_px", "width_px")]
    with fake_cluster() as there:

        def run(program: str, *words: str) -> str:
            return command(there, program, *words, cwd=tmp_path)

        said = run("vimi-data", "crawl", "videos", "--out", "clips")
        said += run("vimi-data", "build-index", "clips", "--out", "memory", "--clip", "offline")
        words = ("augment", "clips", "--memory", "memory", "--out", "prompts", "--retriever", "bm25")
        said += run("vimi-data", *words, *sizes)
        said += run("vimi-train", "stage1", "prompts", "--out", "run", "--config", "stage1.yaml")
    assert "waiting for nodes of the cluster with 1 CPU" in said
    assert "augment: 4 of 4 rows" in said
    assert "stage1: 8 of 8 rows" in said


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("with_folder", [True, False], ids=["with a working dir", "without"])
def test_a_submitted_job_runs(
    with_folder: bool,
    write_video: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    corpus(tmp_path / "videos", write_video)
    port = free_port()
    with fake_cluster(dashboard_port=int(port)) as there:
        words = ["crawl", str(tmp_path / "videos"), "--out", str(tmp_path / "clips")]
        options = ["--working-dir", str(tmp_path / "videos")] if with_folder else []
        result = submit(there, port, [*options, "--", sys.executable, "-c", CODE, *words])
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (tmp_path / "clips" / "certificate.json").exists()
