"""Laws of export: what is read back is what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from infra.errors import ConfigError
from infra.storage import read_json, write_json
from model.data.shards import open_shards
from model.sampling.export import ExportConfig, check, load_exported, named_weights, read_exported, run
from model.training.config import Stage1Config
from model.training.loop import Training
from model.training.preflight import prepare_index, read_index


@pytest.mark.parametrize("preset", ["fit-tiny", "dit-tiny"])
def test_reloaded_export_equals_the_trained_model(
    stage_values: Callable[..., dict[str, Any]], tmp_path: Path, preset: str
) -> None:
    backbone = {"backbone": {"num_blocks": 1, "dim": 64}} if preset == "dit-tiny" else {}
    config = Stage1Config.model_validate(stage_values(preset=preset, **backbone))
    prepare_index(config, open_shards(config.prompts))
    training = Training(config, read_index(config.out))
    training.step()
    training.save({})
    training.close()
    out = tmp_path / "export"
    certificate = run(ExportConfig(run=config.out, out=str(out)))
    assert {file.path for file in certificate.files} == {"model.safetensors", "config.json"}
    trained, read = named_weights(training.model), named_weights(load_exported(str(out)))
    assert trained.keys() == read.keys() and all(trained[name].equal(read[name]) for name in trained)
    averaged = run(ExportConfig(run=config.out, out=str(tmp_path / "ema"), ema="power-0.05"))
    stored = training.emas["power-0.05"].weights
    exported = load_file(tmp_path / "ema" / "model.safetensors")
    assert all(stored[name].equal(exported[name]) for name in stored)
    assert averaged.facts["ema"] == "power-0.05"
    said = read_json(str(out / "config.json"))
    assert (said["position"], said["stage"], said["ema"]) == (4, "stage1", "weights")
    assert said["backbone"]["class"] == {"fit-tiny": "Fit", "dit-tiny": "Dit"}[preset]
    write_json(str(out / "config.json"), said | {"format": 3})  # before references were tied to their places
    with pytest.raises(ConfigError, match=r"export .* has format 3 .*legal: format"):
        read_exported(str(out))


def test_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        check(ExportConfig(run=str(tmp_path), out=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="no exported model"):
        load_exported(str(tmp_path))
