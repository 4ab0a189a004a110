"""What Ray Train adds to a step: the same loop under Ray Train and under nothing but Python.

    python tests/bench/bench_ray_tax.py [--steps 120]

Both run `model.training.loop.Training` on the same shards, one process, the same number of threads, with
checkpoints in the background; medians of the steps after the first ten.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from infra.cluster import RayConfig, ray_session
from model.data.shards import open_shards
from model.training.door import prepare_index, read_index
from model.training.loop import Training
from model.training.stages import Stage1Config

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))


def config_for(folder: Path, name: str, steps: int) -> Stage1Config:
    return Stage1Config.model_validate(
        {
            "prompts": str(folder / "prompts"),
            "out": str(folder / name),
            "samples": steps * 2,
            "batch_size": 2,
            "preset": "fit-tiny",
            "num_frames": 8,
            "height_px": 24,
            "width_px": 40,
            "encoder": json.loads((folder / "encoder.json").read_text()),
            "optim": {"name": "adamw", "lr": 1e-4},
            "validation": {"num_samples": 0},
        }
    )


def time_steps(words: dict[str, Any]) -> None:
    """Step and checkpoint-stall times of one run, written beside it."""
    torch.set_num_threads(words["threads"])
    config = Stage1Config.model_validate(words["config"])
    training = Training(config, read_index(config.out))
    steps_s, stalls_s = [], []
    for number in range(config.num_steps):
        started_s = time.perf_counter()
        training.step()
        steps_s.append(time.perf_counter() - started_s)
        if number % 40 == 39:
            training.writer.wait()
            started_s = time.perf_counter()
            training.save({})
            stalls_s.append(time.perf_counter() - started_s)
    training.close()
    (Path(config.out) / "times.json").write_text(json.dumps({"steps": steps_s, "stalls": stalls_s}))


def under_ray(config: Stage1Config, threads: int) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    words = {"config": config.model_dump(mode="json"), "threads": threads}
    scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1})
    storage = RunConfig(name="ray", storage_path=config.out)
    TorchTrainer(time_steps, train_loop_config=words, scaling_config=scaling, run_config=storage).fit()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    conftest: Any = importlib.import_module("conftest")  # the tests' maker of shards

    found: dict[str, list[float]] = {"plain": [], "ray": []}
    stalls: list[float] = []
    with tempfile.TemporaryDirectory() as name, ray_session(RayConfig(num_cpus=1)):
        folder = Path(name)
        rows = [conftest.prompt_row(n) for n in range(40)]
        conftest.write_shards(folder / "prompts", rows, job="augment", group_rows=8, file_rows=40)
        (folder / "encoder.json").write_text(json.dumps(conftest.write_tiny_encoder(folder)))
        for number in range(options.rounds):
            for kind in ("plain", "ray"):
                config = config_for(folder, f"{kind}-{number}", options.steps)
                prepare_index(config, open_shards(config.prompts))
                words = {"config": config.model_dump(mode="json"), "threads": 1}
                time_steps(words) if kind == "plain" else under_ray(config, 1)
                times = json.loads((Path(config.out) / "times.json").read_text())
                found[kind] += times["steps"][10:]
                stalls += times["stalls"]
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    print(f"{'loop':12} {'median step':>12}")
    for kind, seconds in medians.items():
        print(f"{kind:12} {seconds * 1e3:9.1f} ms")
    print(f"ray / plain  {medians['ray'] / medians['plain']:12.3f}")
    print(
        f"checkpoint stall: median {statistics.median(stalls) * 1e3:.1f} ms, worst {max(stalls) * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
