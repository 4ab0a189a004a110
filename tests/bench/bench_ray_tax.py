"""What Ray Train adds to a step: the run's own loop under Ray Train, and the same loop without Ray.

    python tests/bench/bench_ray_tax.py [--steps 120]

Both are one process with a gloo group of one, on the same shards with one thread: steps, records, and
checkpoints in the background. Ray's adds `ray.train.report` at each checkpoint and the look-out for notices
at each record. Rounds are interleaved; medians of the steps after the first ten of each.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from infra.cluster import RayConfig, ray_session
from model.data.shards import open_shards
from model.training.door import prepare_index, read_index
from model.training.stages import Stage1Config
from tests.model import conftest
from tests.model.runs import free_port

CHECKPOINT_STEPS = 20


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
            "validation": {"num_samples": 0, "held_out_frac": 0},
            "preview": {"num_videos": 0},
            "checkpoint": {"every_samples": 2 * CHECKPOINT_STEPS},
            "log": {"every_samples": 10},
            "cpus_per_worker": 1,
        }
    )


def plain(_rank: int, values: dict[str, Any], port: str) -> None:
    """The loop of `model.training.train.train` without Ray."""
    from model.training.loop import Training
    from model.training.report import Reporter

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1)
    config = Stage1Config.model_validate(values)
    training = Training(config, read_index(config.out))
    reporter = Reporter(training, aside=False)
    times_s = [time.perf_counter()]
    while training.position < config.total_samples:
        reporter.note(outcome := training.step())
        if reporter.is_due("log"):
            reporter.log(outcome)
        if reporter.is_due("checkpoint"):
            training.writer.wait()
            training.save(reporter.last)
        times_s.append(time.perf_counter())
    training.close()
    (Path(config.out) / "times.json").write_text(json.dumps(times_s))
    dist.destroy_process_group()


def under_ray(config: Stage1Config) -> None:
    from model.training.driver import fit
    from model.training.train import train

    place = str(Path(config.out) / "times.json")

    def timed(words: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        times_s: list[float] = []
        train(words, after_step=lambda _: times_s.append(time.perf_counter()))
        Path(place).write_text(json.dumps(times_s))

    fit(config, timed, num_groups=5)


def steps_ms(config: Stage1Config) -> tuple[list[float], list[float]]:
    """(steps without a checkpoint, steps with one), ms, after the first ten."""
    times_s = json.loads((Path(config.out) / "times.json").read_text())
    took = [(after - before) * 1e3 for before, after in itertools.pairwise(times_s)]
    first = config.num_steps - len(took)  # the first one's start is not known to the outside
    numbered = [(first + n + 1, ms) for n, ms in enumerate(took)][10:]
    ordinary = [ms for n, ms in numbered if n % CHECKPOINT_STEPS]
    return ordinary, [ms for n, ms in numbered if n % CHECKPOINT_STEPS == 0]


def stall_ms(config: Stage1Config) -> float:
    """What a checkpoint holds the training thread up, by the run's own records."""
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    held_s = sum(json.loads(line).get("checkpoint_s", 0.0) for line in lines)
    steps = config.log.every_samples // config.batch_size
    return held_s * steps * 1e3 / (config.num_steps // CHECKPOINT_STEPS - 1)  # the last one is in no record


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    steps: dict[str, list[float]] = {"plain": [], "ray": []}
    saves: dict[str, list[float]] = {"plain": [], "ray": []}
    ratios, stalls_ms = [], []
    with tempfile.TemporaryDirectory() as name, ray_session(RayConfig(num_cpus=1)):
        folder = Path(name)
        rows = [conftest.prompt_row(n) for n in range(40)]
        conftest.write_shards(folder / "prompts", rows, job="augment", group_rows=8, file_rows=40)
        (folder / "encoder.json").write_text(json.dumps(conftest.write_tiny_encoder(folder)))
        for number in range(options.rounds):
            medians = {}
            for kind in ("plain", "ray"):
                config = config_for(folder, f"{kind}-{number}", options.steps)
                prepare_index(config, open_shards(config.prompts))
                if kind == "plain":
                    mp.spawn(plain, args=(config.model_dump(mode="json"), free_port()))  # pyright: ignore
                else:
                    under_ray(config)
                ordinary, with_save = steps_ms(config)
                medians[kind] = statistics.median(ordinary)
                steps[kind] += ordinary
                saves[kind] += with_save
                stalls_ms.append(stall_ms(config))
            ratios.append(medians["ray"] / medians["plain"])
    print(f"{'loop':8} {'median step':>12} {'with a checkpoint':>18}")
    for kind in steps:
        print(f"{kind:8} {statistics.median(steps[kind]):9.1f} ms {statistics.median(saves[kind]):15.1f} ms")
    print(f"ray / plain: {statistics.median(ratios):.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")
    more = statistics.median(saves["ray"]) - statistics.median(steps["ray"])
    print(f"a step with a checkpoint and its report takes {more:.1f} ms more under Ray: the files are written")
    print(
        f"beside it, on the same cores; the training thread itself waits {statistics.median(stalls_ms):.1f} ms"
    )


if __name__ == "__main__":
    main()
