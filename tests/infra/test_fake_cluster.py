"""Clusters as shipped: a head without CPUs, no worker yet; jobs ask Ray for what they need, and say so."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.infra.fake_cluster import ROOT, command, fake_cluster
from tests.model.runs import free_port
from tests.pipeline.conftest import write_video  # noqa: F401 # pyright: ignore[reportUnusedImport]


def corpus(folder: Path, write: Any) -> None:
    for number, noun in enumerate(("dog", "cat", "boat", "car")):
        path = write(folder / f"{number}.mp4", num_frames=12, fps=6, seed=number)
        path.with_suffix(".txt").write_text(f"a {noun} moves to the right")


@pytest.mark.slow
@pytest.mark.ray
def test_the_data_side_runs_on_a_cluster_that_starts_from_none(
    write_video: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    corpus(tmp_path / "videos", write_video)
    with fake_cluster() as there:
        said = command(there, "vimi-data", "crawl", "videos", "--out", "clips", cwd=tmp_path)
        said += command(
            there, "vimi-data", *["build-index", "clips", "--out", "memory", "--clip", "offline"], cwd=tmp_path
        )
        words = ["augment", "clips", "--memory", "memory", "--out", "prompts", "--retriever", "bm25"]
        said += command(there, "vimi-data", *words, cwd=tmp_path)
    assert "waiting for nodes of the cluster with 1 CPU" in said
    assert "augment: 4 of 4 rows" in said


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
        code = "from cli.data import main; main()"
        words = [
            sys.executable,
            "-c",
            code,
            "crawl",
            str(tmp_path / "videos"),
            "--out",
            str(tmp_path / "clips"),
        ]
        options = ["--working-dir", str(tmp_path / "videos")] if with_folder else []
        result = subprocess.run(
            [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", f"http://127.0.0.1:{port}",
             *options, "--", shlex.join(words)],
            env=there, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (tmp_path / "clips" / "certificate.json").exists()
