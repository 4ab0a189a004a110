"""Laws of looking at a run: the same numbers and videos in the loop and beside it; training never waits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.storage import read_json
from model.training.aside import choose_place
from model.training.checkpoint import committed_positions, prune
from model.training.door import read_index
from model.training.observe import (
    Observer,
    awaited,
    give_up,
    observe_checkpoint,
    read_results,
    result_uri,
)
from model.training.sampled import preview_uri
from model.training.stages import Stage1Config
from model.training.telemetry import read_metrics
from model.training.train import run
from tests.model.runs import advance, open_training

Values = Callable[..., dict[str, Any]]
PREVIEW = {"num_videos": 2, "num_steps": 2, "every_samples": 16}


@pytest.mark.parametrize("ema", ["weights", "power-0.05"])
def test_beside_the_loop_is_found_what_is_found_in_it(stage_values: Values, tmp_path: Path, ema: str) -> None:
    torch.set_num_threads(1)
    config = Stage1Config.model_validate(stage_values(preview=PREVIEW | {"ema": ema}))
    training = open_training(config)
    advance(training, 4)
    training.save({})
    training.writer.wait()
    before = training.weights_sha256()
    record = Observer(training, read_index(config.out)).look()
    assert training.weights_sha256() == before
    folder = Path(preview_uri(config.out, 16))
    inline = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"sample-000.mp4", "sample-000.png", "sample-001.mp4", "samples.json"} <= set(inline)
    for path in folder.iterdir():
        path.unlink()
    training.close()
    assert awaited(config) == [16]
    observe_checkpoint(config, 16, torch.device("cpu"))
    assert read_results(config.out, ()) == [(16, record)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == inline
    assert awaited(config) == []


def test_checkpoint_stays_until_it_was_looked_at(stage_values: Values) -> None:
    config = Stage1Config.model_validate(stage_values(checkpoint={"every_samples": 8, "num_to_keep": 1}))
    training = open_training(config)
    training.writer.held = lambda: awaited(config)
    for _ in range(3):
        advance(training, 2)
        training.save({})
        training.writer.wait()
    assert committed_positions(config.out) == [8, 16, 24] == awaited(config)
    give_up(config, 8, "a lost node")
    assert awaited(config) == [16, 24]
    advance(training, 2)
    training.save({})
    training.close()
    assert committed_positions(config.out) == [16, 24, 32]
    prune(config.out, 1)
    assert committed_positions(config.out) == [32]
    assert read_json(result_uri(config.out, 8))["error"] == "a lost node"
    assert read_results(config.out, ()) == []


@pytest.mark.parametrize(
    ("observe", "spare_cpus", "gpus", "spare_gpus", "options"),
    [
        ("auto", 0, 0, 0, None),
        ("auto", 1, 0, 0, {"num_cpus": 1}),
        ("auto", 8, 2, 0, None),  # a CPU can't stand in for a GPU: other numbers, and far slower
        ("auto", 8, 2, 1, {"num_cpus": 1, "num_gpus": 1}),
        ("inline", 8, 2, 1, None),
        ("spare", 0, 0, 0, {"num_cpus": 1}),
        ("background", 0, 0, 0, {"num_cpus": 0}),
    ],
)
def test_place_follows_the_room_there_is(
    stage_values: Values,
    observe: str,
    spare_cpus: float,
    gpus: int,
    spare_gpus: float,
    options: dict[str, Any] | None,
) -> None:
    config = Stage1Config.model_validate(stage_values(observe=observe))
    place = choose_place(config, spare_cpus=spare_cpus, spare_gpus=spare_gpus, uses_gpus=gpus > 0)
    assert place.options == options
    assert place.is_aside == (options is not None)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("observe", ["auto", "background"])
def test_run_beside_its_validation_records_the_same_losses(
    ray_cluster: None, stage_values: Values, tmp_path: Path, observe: str
) -> None:
    values = stage_values(
        observe=observe,
        cpus_per_worker=1,  # the second CPU of the session is free for validation
        checkpoint={"every_samples": 16, "num_to_keep": 1},
        preview=PREVIEW | {"every_samples": None},
    )
    config = Stage1Config.model_validate(values)
    run(config)
    found = {r["samples"]: r for r in read_metrics(config.out) if "val/held_out" in r}
    assert sorted(found) == [16, 32, 40]
    assert committed_positions(config.out) == [40]  # those that were held are gone
    assert Path(preview_uri(config.out, 40), "samples.json").exists()
    torch.set_num_threads(1)
    training = open_training(config.model_copy(update={"out": str(tmp_path / "again")}))
    observer = Observer(training, read_index(training.config.out))
    for position in (16, 32, 40):
        advance(training, (position - training.position) // 4)
        assert observer.validation.run() == {k: v for k, v in found[position].items() if k != "samples"}
    training.close()
