"""Laws of a run's numbers: metrics.jsonl reads as if unbroken, trackers hear of all of it."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.run_folder import RunFolder
from model.training.metrics import TRACKERS, MetricsLog, Stopwatch, draw_curves, open_trackers

RECORD = {
    "loss": 0.5,
    "samples_per_s": 10.0,
    "data_s": 0.01,
    "encode_s": 0.01,
    "forward_s": 0.03,
    "backward_s": 0.04,
    "optimizer_s": 0.01,
}


def open_log(run: Path, *trackers: str, position: int = 0) -> MetricsLog:
    folder = RunFolder(str(run))
    return MetricsLog(folder, open_trackers(trackers, folder, position=position, config={}), position=position)


def test_resumed_log_reads_as_if_unbroken(tmp_path: Path) -> None:
    first = open_log(tmp_path)
    for samples in (8, 16, 24):
        first.write(samples, RECORD)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"samples": 32, "lo')  # torn by a kill
    second = open_log(tmp_path, position=16)
    second.write(24, RECORD | {"loss": 0.4})
    found = [(r["samples"], r["loss"]) for r in RunFolder(str(tmp_path)).records()]
    assert found == [(8, 0.5), (16, 0.5), (24, 0.4)]


def sheet() -> dict[str, bytes]:
    """One contact sheet, as a preview gives it."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(buffer, format="PNG")
    return {"0 A dog runs.": buffer.getvalue()}


def test_tensorboard_shows_numbers_by_group_and_sampled_videos(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for position in (0, 16):  # the second life begins where the first one's checkpoint was
        log = open_log(tmp_path, "tensorboard", position=position)
        log.write(position + 16, RECORD | {"val/video documents right": 0.7})
        if 16 not in log.shown:
            log.show(16, sheet())
        log.close()
    assert log.validated == {16} and log.shown == {16}  # what it found
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    groups = {tag.partition("/")[0] for tag in found.Tags()["scalars"]}
    assert groups == {"training", "validation", "speed", "seconds of a step"}
    assert [event.step for event in found.Scalars("validation/video documents right")] == [16, 32]
    assert [event.step for event in found.Images("samples/0 A dog runs.")] == [16]
    assert [r["samples"] for r in RunFolder(str(tmp_path)).records() if "videos" in r] == [16]


def test_runs_of_weights_and_biases_go_on_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for position in (0, 8):
        log = open_log(tmp_path, "wandb:films", position=position)
        log.write(position + 8, RECORD)
        log.show(position + 8, sheet())
        log.close()
    assert len(list((tmp_path / "wandb").rglob("*.png"))) == 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_a_tracker_from_outside_hears_of_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, float]] = []

    class Toy:
        package = "json"

        def __init__(self, run: RunFolder, *, position: int, argument: str, config: Any) -> None:
            assert argument == "word" and config == {}

        def write(self, position: int, numbers: Mapping[str, float]) -> None:
            heard.append((position, numbers["loss"]))

        def show(self, position: int, pictures: Mapping[str, bytes]) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setitem(TRACKERS, "toy", Toy)
    log = open_log(tmp_path, "toy:word")
    log.write(8, RECORD)
    log.close()
    assert heard == [(8, 0.5)]


def test_stopwatch_means_are_per_step() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.part("data"):
            pass
        watch.num_steps += 1
    assert set(watch.take()) == {"data_s"} and watch.take() == {}


def test_curves_are_drawn(tmp_path: Path) -> None:
    assert draw_curves(RunFolder(str(tmp_path))) is None
    log = open_log(tmp_path)
    for samples in (8, 16):
        log.write(samples, RECORD)
        log.write(samples, {"val/video documents right": 0.7})
    place = draw_curves(RunFolder(str(tmp_path)))
    assert place and Path(place).read_bytes().startswith(b"\x89PNG")
