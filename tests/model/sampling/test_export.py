"""Laws of export: what is read back is what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from infra.errors import ConfigError
from infra.storage import read_json
from model.data.shards import open_shards
from model.sampling.export import ExportConfig, check, largest_difference, load_exported, run
from model.training.door import prepare_index, read_index
from model.training.loop import Training
from model.training.stages import Stage1Config


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
    assert certificate.facts["reload_difference"] == 0
    assert largest_difference(load_exported(str(out)), training.model) == 0
    averaged = run(ExportConfig(run=config.out, out=str(tmp_path / "ema"), ema="power-0.05"))
    stored = training.emas["power-0.05"].weights
    exported = load_file(tmp_path / "ema" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(stored[name].equal(exported[name]) for name in stored)
    assert averaged.facts["ema"] == "power-0.05"
    index = read_json(str(out / "model_index.json"))
    assert index["checkpoint"] == {"position": 4, "stage": "stage1", "ema": "weights"}


def test_scheduler_opens_in_diffusers(trained_run: Stage1Config, tmp_path: Path) -> None:
    from diffusers import EDMEulerScheduler  # pyright: ignore[reportPrivateImportUsage]

    run(ExportConfig(run=trained_run.out, out=str(tmp_path / "export")))
    scheduler = EDMEulerScheduler.from_pretrained(str(tmp_path / "export" / "scheduler"))
    assert scheduler.config["sigma_max"] == 80.0  # pyright: ignore


def test_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        check(ExportConfig(run=str(tmp_path), out=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="no exported model"):
        load_exported(str(tmp_path))
