"""Laws of what a run says of itself."""

from pathlib import Path

import pytest
import torch

from model.training.telemetry import (
    Follower,
    LogConfig,
    MetricsLog,
    Stopwatch,
    draw_curves,
    progress_line,
    read_metrics,
)

RECORD = {
    "loss": 0.5,
    "samples_per_s": 10.0,
    "data_s": 0.01,
    "encode_s": 0.01,
    "forward_s": 0.03,
    "backward_s": 0.04,
    "optimizer_s": 0.01,
}


def open_log(run: Path, position: int = 0) -> MetricsLog:
    quiet = LogConfig(tensorboard=False)
    return MetricsLog(str(run), quiet, enabled=True, position=position, name="test", flat_config={})


def test_resumed_log_reads_as_if_unbroken(tmp_path: Path) -> None:
    first = open_log(tmp_path)
    for samples in (8, 16, 24):
        first.write(samples, RECORD)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"samples": 32, "lo')  # torn by a kill
    second = open_log(tmp_path, position=16)
    second.write(24, RECORD | {"loss": 0.4})
    found = [(r["samples"], r["loss"]) for r in read_metrics(str(tmp_path))]
    assert found == [(8, 0.5), (16, 0.5), (24, 0.4)]


def test_tensorboard_is_written(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), LogConfig(), enabled=True, position=0, name="test", flat_config={})
    log.write(8, RECORD)
    log.close()
    assert any((tmp_path / "tensorboard").iterdir())


def test_driver_shows_each_record_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.write(8, RECORD)
    with Follower(str(tmp_path), 100, position=8, every_s=0.01):
        log.write(16, RECORD)
        log.write(16, {"val/loss video retrieval on": 0.7})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" samples")[0].strip() for line in lines] == [
        "16 / 100",
        "validation loss at 16",
    ]


def test_progress_line_says_where_the_time_goes() -> None:
    line = progress_line(RECORD | {"samples": 20}, 100)
    assert "20 / 100 samples" in line and "ETA 8 s" in line and "backward 40%" in line


def test_stopwatch_means_are_per_step() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.part("data"):
            pass
        watch.num_steps += 1
    assert set(watch.take()) == {"data_s"} and watch.take() == {}


def test_curves_are_drawn(tmp_path: Path) -> None:
    assert draw_curves(str(tmp_path)) is None
    log = open_log(tmp_path)
    for samples in (8, 16):
        log.write(samples, RECORD)
        log.write(samples, {"val/loss video retrieval on": 0.7})
    place = draw_curves(str(tmp_path))
    assert place and Path(place).read_bytes().startswith(b"\x89PNG")
