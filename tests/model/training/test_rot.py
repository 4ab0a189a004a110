"""Flipped bits in runs, checkpoints and exports: refused in one line or without effect, by all readers."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.claim import open_job
from infra.errors import VimiError
from infra.run_folder import RunFolder
from model.backbones.folder import read_base
from model.sampling import export, generate, plan
from model.training.config import Stage1Config, Stage2Config, StageConfig
from model.training.loop import Training
from model.training.metrics import MetricsLog
from model.training.preflight import inspect, prepare_index, read_index
from model.training.state import hash_tensors
from pipeline.report.read import read_run
from tests.model.prompt_tables import prompt_row, write_shards
from tests.model.runs import fingerprint

TASKS = ("subject_driven", "video_prediction", "text_to_video")
Run = Callable[[], Any]


@pytest.fixture(scope="module")
def config(trained_run: Stage1Config, tmp_path_factory: pytest.TempPathFactory) -> Stage1Config:
    """A run as its job leaves it, its export beside it, and instructions."""
    folder = tmp_path_factory.mktemp("workspace")
    config = trained_run.model_copy(update={"out": str(folder / "run")})
    shutil.copytree(trained_run.out, config.out)
    write_workspace(config, {"num_frames": 4, "height": 12, "width": 16})
    return config


def write_workspace(config: Stage1Config, size: dict[str, Any]) -> None:
    """What a run's job, its export and its instructions leave beside its checkpoints."""
    folder = Path(config.out).parent
    open_job(config.out, job="stage1", config=config, inputs=inspect(config).inputs, portable=True)
    log = MetricsLog(RunFolder(config.out))
    for position in (4, 8):
        log.write(position, {"loss": 1 / position, "val/loss video retrieval on": 0.25})
    export.run(export.ExportConfig(run=config.out, out=str(folder / "export")))
    rows = [prompt_row(n, task=TASKS[n % 3], **size) for n in range(12)]
    write_shards(folder / "instructions", rows, job="instruct", group_rows=4, file_rows=16)


def commands(config: Stage1Config) -> dict[str, Run]:
    """Name -> what it makes of the run, its checkpoints or its export; nothing of it needs Ray."""
    folder = Path(config.out).parent

    def sampled() -> Any:
        values = {"run": config.out, "out": str(folder / "samples"), "prompts": ["a dog runs"], "num_steps": 1}
        made = generate.run(plan.SampleConfig.model_validate(values))
        return [file.sha256 for file in made.files]

    def exported() -> Any:
        made = export.run(export.ExportConfig(run=config.out, out=str(folder / "export two")))
        return [file.sha256 for file in made.files]

    def read() -> Any:
        return hash_tensors(export.named_weights(export.load_exported(str(folder / "export"))))

    def resumed() -> Any:
        ready = inspect(config)
        open_job(config.out, job="stage1", config=config, inputs=ready.inputs, portable=True)
        prepare_index(config, ready.shards)
        return trained(config)

    def tuned() -> Any:
        values = config.model_dump(mode="json") | {
            "prompts": str(folder / "instructions"),
            "out": str(folder / "two"),
            "start_from": config.out,
        }
        two = Stage2Config.model_validate(values)
        prepare_index(two, inspect(two).shards)
        return trained(two)

    def reported() -> Any:
        found = read_run(config.out)
        return found.config, found.records

    return {
        "sample": sampled,
        "export": exported,
        "read": read,
        "stage1": resumed,
        "stage2": tuned,
        "report": reported,
    }


def trained(config: StageConfig) -> Any:
    training = Training(config, read_index(config.out))
    found = fingerprint(training)
    training.close()
    return found


@pytest.fixture(scope="module")
def before(config: Stage1Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command makes of the undamaged folder."""
    kept = tmp_path_factory.mktemp("kept") / "whole"
    shutil.copytree(Path(config.out).parent, kept)
    return {name: from_whole(config, kept, run) for name, run in commands(config).items()} | {"": kept}


def from_whole(config: Stage1Config, kept: Path, run: Run, harm: Callable[[], None] = lambda: None) -> Any:
    """Run in a folder that is as it was before, but for the harm."""
    folder = Path(config.out).parent
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    harm()
    read_base.cache_clear()  # another process reads it anew
    return run()


def flip(path: Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[random.integers(0, len(data))] ^= 1 << int(random.integers(0, 8))
    path.write_bytes(data)


def is_refused(config: Stage1Config, before: dict[str, Any], name: str, place: str, seed: int) -> bool:
    """Whether a command refuses a folder with one flipped bit; else it must make of it what it did before."""
    where, path = f"{name} with {place} flipped by seed {seed}", Path(config.out).parent / place
    try:
        after = from_whole(
            config, before[""], commands(config)[name], lambda: flip(path, np.random.default_rng(seed))
        )
    except VimiError as error:
        assert len(str(error).splitlines()) == 1, where
        return True
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    if place.endswith("metrics.jsonl") and name == "report":
        assert after[0] == before[name][0] and all(record in before[name][1] for record in after[1]), where
    else:
        assert after == before[name], where
    return False


def places(config: Stage1Config, *parts: str) -> list[str]:
    """Files of the workspace whose path has all parts."""
    folder = Path(config.out).parent
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return [place for place in found if all(part in place for part in parts)]


@pytest.mark.parametrize("name", ["sample", "export", "stage1", "stage2"])
def test_a_flipped_bit_of_a_checkpoint_is_refused(
    config: Stage1Config, before: dict[str, Any], name: str
) -> None:
    for seed, place in enumerate(places(config, "run/checkpoints", "000008/")):
        assert is_refused(config, before, name, place, seed), place


def test_a_flipped_bit_of_an_export_is_refused(config: Stage1Config, before: dict[str, Any]) -> None:
    for name in ("model.safetensors", "config.json", "certificate.json"):
        assert is_refused(config, before, "read", f"export/{name}", 0), name


def test_flipped_bits_of_what_a_run_says_of_itself_are_refused_or_harmless(
    config: Stage1Config, before: dict[str, Any]
) -> None:
    for name in ("job.json", "config.yaml", "index.parquet", "index.json"):
        is_refused(config, before, "stage1", f"run/{name}", 0)
    for name in ("job.json", "config.yaml"):
        assert is_refused(config, before, "report", f"run/{name}", 0)
    for seed in range(50):
        assert not is_refused(config, before, "report", "run/metrics.jsonl", seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_minutes_of_flipped_bits_are_refused_or_harmless(
    config: Stage1Config, before: dict[str, Any]
) -> None:
    started_s, seed = time.monotonic(), 1000
    files = places(config, "run/") + places(config, "export/")
    while time.monotonic() - started_s < float(os.environ.get("VIMI_FUZZ_S", "600")):
        for name in commands(config):
            seed += 1
            is_refused(config, before, name, files[seed % len(files)], seed)
