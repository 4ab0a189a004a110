"""Laws of what a run says of itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infra.storage import write_json
from model.training.follow import Follower, progress_line
from model.training.report import collect
from model.training.sampled import preview_uri
from model.training.stopwatch import Stopwatch
from model.training.telemetry import (
    LogConfig,
    MetricsLog,
    draw_curves,
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


def sampled(run: Path, position: int) -> None:
    """A run's folder with the videos of one position, as a preview leaves it."""
    folder = Path(preview_uri(str(run), position))
    folder.mkdir(parents=True)
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(folder / "sample-000.png")
    entry = {"prompt": "A dog runs.", "sheet": "sample-000.png"}
    write_json(str(folder / "samples.json"), {"samples": [entry]})


def test_tensorboard_shows_numbers_by_group_and_sampled_videos_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for position in (0, 16):  # the second life begins where the first one's checkpoint was
        log = MetricsLog(str(tmp_path), LogConfig(), enabled=True, position=position, name="", flat_config={})
        log.write(position + 16, RECORD | {"val/loss video retrieval on": 0.7})
        if position == 0:
            sampled(tmp_path, 16)
        collect(log, str(tmp_path), position + 16)
        collect(log, str(tmp_path), position + 16)
        log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    groups = {tag.partition("/")[0] for tag in found.Tags()["scalars"]}
    assert groups == {"training", "validation", "speed", "seconds of a step"}
    assert [event.step for event in found.Scalars("validation/video retrieval on")] == [16, 32]
    assert [event.step for event in found.Images("samples/0 A dog runs.")] == [16]
    assert [r["samples"] for r in read_metrics(str(tmp_path)) if "videos" in r] == [16]


def test_runs_of_weights_and_biases_go_on_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for position in (0, 8):
        config = LogConfig(tensorboard=False, wandb_project="films")
        log = MetricsLog(str(tmp_path), config, enabled=True, position=position, name="test", flat_config={})
        log.write(position + 8, RECORD)
        sampled(tmp_path, position + 8)
        collect(log, str(tmp_path), position + 8)
        log.close()
    assert len(list((tmp_path / "wandb").rglob("*.png"))) == 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_late_records_are_written_once_under_their_own_position(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(8, RECORD)
    log.write(16, RECORD)
    late = {"val/loss video retrieval on": 0.7, "val/held_out": 0}
    for _ in range(2):
        write_json(str(tmp_path / "observed/samples-000000000008.json"), {"samples": 8, "record": late})
        collect(log, str(tmp_path), 16)
    assert [r["samples"] for r in read_metrics(str(tmp_path))] == [8, 16, 8]
    log.close()
    again = open_log(tmp_path, position=8)  # resumed from the checkpoint that was looked at
    assert again.validated == {8} and len(again.lines) == 2
    again.close()


def test_driver_shows_each_record_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.write(8, RECORD)
    with Follower(str(tmp_path), 100, position=8, every_s=0.01):
        log.write(16, RECORD)
        log.write(16, {"val/loss video retrieval on": 0.7})
        log.show(16, {"0 A dog runs.": b""})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" samples")[0].strip() for line in lines] == [
        "16 / 100",
        "validation loss at 16",
        "videos sampled at 16",
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
