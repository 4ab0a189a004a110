"""Laws of training on a GPU: what interrupts a run doesn't show in its last bit there either."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.run_folder import RunFolder
from model.training.checkpoint import load_state
from model.training.config import Stage1Config
from model.training.state import weights_of
from tests.model.runs import advance, fingerprint, open_training, unbroken

Values = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STEPS = 6


@pytest.fixture
def real_size(stage_values: Values, make_shards: Callable[..., Path]) -> Values:
    """Values of a run on Snap Video's small shape: attention over more keys than one thread block reads."""

    def make(**changes: Any) -> dict[str, Any]:
        prompts = make_shards(22, num_frames=16, height=36, width=64)
        shape = {"num_frames": 16, "height_px": 36, "width_px": 64}
        backbone = {"num_latents": 256, "qk_norm": True, "dropout": 0.1}
        fixed = {"prompts": str(prompts), "batch_size": 8, "samples": 8 * STEPS, "backbone": backbone}
        return stage_values(**shape, **fixed, **changes)

    return make


@pytest.mark.parametrize("optimizer", ["lamb", "muon"])
@pytest.mark.parametrize("compiled", [False, True])
def test_interrupted_training_equals_unbroken_training_on_a_gpu(
    real_size: Values, tmp_path: Path, compiled: bool, optimizer: str
) -> None:
    values = real_size(
        parallel={"dtype": "bfloat16", "compile": compiled},
        optim={"name": optimizer, "lr": 1e-3},
        accumulation=2,
    )
    whole = Stage1Config.model_validate(values | {"out": str(tmp_path / "whole")})
    parts = Stage1Config.model_validate(values | {"out": str(tmp_path / "parts")})
    for until in (2, 3):
        training = open_training(parts)
        training.rehearse()
        advance(training, until - training.position // parts.batch_size)
        training.save({})
        training.close()
    training = open_training(parts)
    advance(training, STEPS - 3)
    found = fingerprint(training)
    training.close()
    assert found == unbroken(whole, STEPS)


def test_checkpoint_of_a_gpu_holds_what_was_there_when_it_was_asked_for(real_size: Values) -> None:
    """The next step starts while the checkpoint is written."""
    training = open_training(Stage1Config.model_validate(real_size()))
    advance(training, 1)
    expected = training.weights_sha256()
    training.save({})
    advance(training, 2)
    training.close()
    again = open_training(training.config)
    assert again.position == 8 and again.weights_sha256() == expected
    again.close()


def test_every_save_of_a_gpu_run_is_whole(real_size: Values) -> None:
    """The copies' memory is used again, while the random state is another tensor each time."""
    training = open_training(Stage1Config.model_validate(real_size(checkpoint={"num_to_keep": None})))
    expected = []
    for _ in range(4):
        advance(training, 1)
        expected.append(training.weights_sha256())
        training.save({})
    training.close()
    for number, sha in enumerate(expected):
        again = open_training(training.config)
        load_state(RunFolder(training.config.out).checkpoint(8 * (number + 1)), weights_of(again.model))
        assert again.weights_sha256() == sha
        again.close()
