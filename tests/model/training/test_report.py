"""Laws of what a run says of itself: each thing once, in words, with the time and the deaths in it."""

import time
from pathlib import Path

import pytest
import torch

from infra.run_folder import COMMITTED, RunFolder
from infra.storage import read_json, write_json
from model.training.metrics import MetricsLog
from model.training.report import RunPrinter, progress_line, validation_line, write_restart
from model.training.validation.loss import summarise
from tests.model.training.test_metrics import RECORD


def test_what_a_worker_died_of_is_said_once_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(str(tmp_path))
    write_restart(run, {1: RuntimeError("of an earlier day")})
    with RunPrinter(run, 100, every_s=0.01):
        write_restart(run, {0: RuntimeError("CUDA error: out of memory\n  in forward"), 3: OSError("gone")})
        time.sleep(0.1)
    said = capsys.readouterr().err
    assert "workers 0, 3 died: RuntimeError: CUDA error: out of memory" in said
    assert said.count("worker") == 1 and "earlier day" not in said and "from 0 samples" in said
    kept = read_json(run.restarts()[-1])["errors"]
    assert "in forward" in kept["0"] and kept["3"].startswith("OSError: gone")


def test_driver_shows_each_record_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(str(tmp_path))
    log = MetricsLog(run)
    log.write(8, RECORD)
    with RunPrinter(run, 100, position=8, every_s=0.01):
        log.write(16, RECORD)
        log.write(16, {"val/video documents right": 0.7})
        log.show(16, {"0 A dog runs.": b""})
        write_json(f"{run.checkpoint(16)}/{COMMITTED}", {})
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    lines.remove(f"saved: {run.checkpoint(16)}")
    assert [line.split(" samples")[0] for line in lines] == [
        "16 / 100",
        "validation loss at 16",
        "videos sampled at 16",
    ]


def test_validation_line_says_what_documents_gain_where_there_is_most_noise() -> None:
    losses = torch.tensor([[[0.2, 0.2, 0.3, 0.5]] * 4, [[0.2, 0.2, 0.3, 0.7]] * 4]).double()
    losses[:, 0, -1] += torch.tensor([0.1, 0.2])  # without documents
    cells = summarise("video", losses, torch.tensor([[True, True, True, False]] * 2))
    line = validation_line({"samples": 1600, "val/held_out": 1, **cells})
    assert "at 1,600 samples: video right 0.3250, none 0.3625, shuffled 0.3250 (q0.9: " in line
    assert line.endswith("none - right +0.1500 ± 0.0500, shuffled - right +0.0000 ± 0.0000)")


def test_progress_line_says_where_the_time_goes() -> None:
    line = progress_line(RECORD | {"samples": 20}, 100)
    assert "20 / 100 samples" in line and "ETA 8 s" in line and "backward 40%" in line
