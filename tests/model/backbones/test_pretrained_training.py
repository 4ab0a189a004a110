"""Trainings that start from a pretrained model: what they train, keep, resume and refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.run_folder import RunFolder
from model.training.checkpoint import tensors_in
from model.training.config import Stage1Config
from tests.model.runs import advance, fingerprint, open_training, unbroken

Values = Callable[..., dict[str, Any]]


def config_of(values: dict[str, Any]) -> Stage1Config:
    return Stage1Config.model_validate(values)


@pytest.mark.parametrize("text", ["replace", "append", "native"])
def test_only_adapters_and_projection_are_trained_and_kept(base_values: Values, text: str) -> None:
    config = config_of(base_values(text=text))
    training = open_training(config)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    advance(training, 2)
    training.save({})
    training.close()
    moved = {name for name, p in training.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name or name.startswith("embedder.") for name in moved)
    assert any("lora_A" in name for name in moved)
    assert any(name.startswith("embedder.") for name in moved) == (text != "native")
    kept = {
        name
        for name in tensors_in(RunFolder(config.out).latest_checkpoint() or "")
        if name.startswith("model.")
    }
    trained = {f"model.{name}" for name, p in training.model.named_parameters() if p.requires_grad}
    assert kept == trained


@pytest.mark.parametrize("text", ["replace", "append"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    base_values: Values, tmp_path: Path, text: str
) -> None:
    values = base_values(text=text, samples=12)
    expected = unbroken(config_of(values), 4)
    config = config_of({**values, "out": str(tmp_path / "broken")})
    first = open_training(config)
    advance(first, 2)
    first.save({})
    first.close()
    second = open_training(config)
    assert second.position == 4
    advance(second, 2)
    assert fingerprint(second) == expected
    second.close()
