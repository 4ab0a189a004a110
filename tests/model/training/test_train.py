"""Laws of a step and of a stage: rounding only, nothing non-finite, stage two goes on from stage one."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import TrainingError
from infra.run_folder import RunFolder
from model.training.checkpoint import CheckpointWriter, load_state
from model.training.config import Stage1Config, Stage2Config
from model.training.state import weights_of
from tests.model.runs import advance, fingerprint, open_training

Values = Callable[..., dict[str, Any]]


def test_accumulation_changes_rounding_only(stage_values: Values, tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        values = stage_values(accumulation=number, out=str(tmp_path / f"run-{number}"))
        training = open_training(Stage1Config.model_validate(values))
        advance(training, 3)
        found.append(weights_of(training.model))
        training.close()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


def test_rehearsal_changes_nothing(stage_values: Values, tmp_path: Path) -> None:
    found = []
    for name in ("with", "without"):
        training = open_training(Stage1Config.model_validate(stage_values(out=str(tmp_path / name))))
        if name == "with":
            assert training.rehearse() == 0  # no device memory on a CPU
        advance(training, 2)
        found.append(fingerprint(training))
        training.close()
    assert found[0] == found[1]


def test_nonfinite_loss_names_its_samples(stage_values: Values) -> None:
    training = open_training(Stage1Config.model_validate(stage_values()))
    before = weights_of(training.model)
    with torch.no_grad():
        training.model.backbone.embed.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"gradient norm is nan; samples with a non-finite loss: [0-9a-f]"):
        training.step()
    assert training.position == 0 and before
    training.close()


def test_a_checkpoint_holds_the_moment_it_was_asked_for_while_training_goes_on(stage_values: Values) -> None:
    """The copy is made beside the next step's passes, and the optimizer waits for it."""
    training = open_training(Stage1Config.model_validate(stage_values()))
    advance(training, 1)
    staging = training.writer.staging
    copy, begun = staging.copy, threading.Event()

    def slow(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        begun.set()
        time.sleep(0.5)
        return copy(state)

    staging.copy = slow
    asked = {name: value.clone() for name, value in weights_of(training.model).items()}
    training.save({})
    assert begun.wait(5)
    advance(training, 2)
    training.writer.wait()
    moved = weights_of(training.model)
    found = {name: torch.empty_like(value) for name, value in asked.items()}
    load_state(RunFolder(training.config.out).checkpoint(training.config.batch_size), found)
    assert all(found[name].equal(value) for name, value in asked.items())
    assert not all(moved[name].equal(value) for name, value in asked.items())
    training.close()


def test_stage_two_starts_from_stage_one(stage_values: Values, make_shards, make_row, tmp_path: Path) -> None:
    first = open_training(Stage1Config.model_validate(stage_values()))
    advance(first, 2)
    first.save({})
    first.writer.wait()
    tasks = ["subject_driven", "video_prediction", "text_to_video"]
    rows = [make_row(n, task=tasks[n % 3], num_frames=4, height=12, width=16) for n in range(12)]
    shards = make_shards(rows=rows, job="instruct", name="instructions")
    values = stage_values(
        prompts=str(shards), out=str(tmp_path / "two"), start_from=first.config.out, batch_size=4
    )
    second = open_training(Stage2Config.model_validate(values))
    assert second.position == 0
    assert second.weights_sha256() == first.weights_sha256()
    advance(second, 1)
    averaged = Stage2Config.model_validate(values | {"start_ema": "power-0.05", "out": str(tmp_path / "three")})
    third = open_training(averaged)
    for name, value in first.emas["power-0.05"].weights.items():
        assert value.equal(weights_of(third.model)[f"model.{name}"])
    for training in (first, second, third):
        training.close()


def test_checkpoint_writer_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = CheckpointWriter(RunFolder(str(tmp_path)))
    writer.save({"model.w": torch.zeros(2)}, {"position": 4})
    with pytest.raises(TrainingError, match="could not be written"):
        writer.wait()
