"""Flipped bits in adapters and in the base model's folder: refused in one line or without effect."""

import os
import time
from typing import Any

import pytest

from model.training.config import Stage1Config
from tests.model.backbones.conftest import SIZE
from tests.model.backbones.tiny_bases import save_wan
from tests.model.conftest import tiny_stage
from tests.model.prompt_tables import prompt_row, write_shards
from tests.model.runs import advance, open_training
from tests.model.training.test_rot import before as before
from tests.model.training.test_rot import commands, is_refused, places, write_workspace


@pytest.fixture(scope="module")
def config(tiny_encoder: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Stage1Config:
    """A run of two steps on a tiny Wan that lies beside it, its export, and instructions."""
    folder = tmp_path_factory.mktemp("workspace")
    rows = [prompt_row(n, **SIZE) for n in range(8)]
    prompts = write_shards(
        tmp_path_factory.mktemp("prompts") / "p", rows, job="augment", group_rows=4, file_rows=8
    )
    values = tiny_stage(prompts, folder / "run", {**tiny_encoder, "max_tokens": 384})
    del values["reference_size_px"]  # that of the videos
    backbone = {"kind": "diffusers", "model": save_wan(folder / "base"), "text": "append", "lora": {"rank": 4}}
    size = {"num_frames": 5, "height_px": 32, "width_px": 48, "batch_size": 2}
    config = Stage1Config.model_validate({**values, **size, "backbone": backbone})
    training = open_training(config)
    advance(training, 4)
    training.save({})
    training.close()
    write_workspace(config, SIZE)
    return config


def test_a_flipped_bit_of_adapters_is_refused(config: Stage1Config, before: dict[str, Any]) -> None:
    for seed, place in enumerate(places(config, "run/checkpoints", "000008/")):
        assert is_refused(config, before, "sample", place, seed), place


def test_a_flipped_bit_of_the_base_is_refused_or_harmless(
    config: Stage1Config,
    before: dict[str, Any],
) -> None:
    for seed, place in enumerate(places(config, "base/")):
        refused = is_refused(config, before, "sample", place, seed)
        assert refused or not place.endswith(".safetensors"), place


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_minutes_of_flipped_bits_are_refused_or_harmless(
    config: Stage1Config,
    before: dict[str, Any],
) -> None:
    started_s, seed = time.monotonic(), 1000
    files = [place for part in ("run/", "base/", "export/") for place in places(config, part)]
    while time.monotonic() - started_s < float(os.environ.get("VIMI_FUZZ_S", "600")):
        for name in commands(config):
            seed += 1
            is_refused(config, before, name, files[seed % len(files)], seed)
