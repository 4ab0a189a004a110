"""What Ray Train adds to a step: the run's own loop under Ray Train, and the same loop without Ray.

    python tests/bench/bench_ray_tax.py [--steps 200]

Both are one process with a gloo group of one, on the same shards with one thread: steps, records, and
checkpoints in the background. Ray's adds `ray.train.report` at each checkpoint and the look-out for notices
at each record. They take turns of ten steps, so that a machine's moods fall on both alike; in the turns of the
loop without Ray all of Ray's processes are stopped. The ratio is the median over pairs of neighbouring turns,
once of the clock and once of what the training thread itself computed, which other guests of the machine and
Ray's processes beside it change less.
"""

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from infra.cluster import RayConfig, ray_session
from model.data.shards import open_shards
from model.training.config import Stage1Config
from model.training.preflight import prepare_index, read_index
from tests.model import conftest
from tests.model.runs import free_port

CHECKPOINT_STEPS, TURN_STEPS = 20, 10


def config_for(folder: Path, name: str, steps: int) -> Stage1Config:
    return Stage1Config.model_validate(
        {
            "prompts": str(folder / "prompts"),
            "out": str(folder / name),
            "samples": steps * 2,
            "batch_size": 2,
            "preset": "fit-tiny",
            "reference_size_px": [24, 40],
            "reference_patch_px": 8,
            "num_frames": 8,
            "height_px": 24,
            "width_px": 40,
            "encoder": json.loads((folder / "encoder.json").read_text()),
            "optim": {"name": "adamw", "lr": 1e-4},
            "validation": {"num_samples": 0, "held_out_frac": 0},
            "preview_every_samples": 0,
            "checkpoint": {"every_samples": 2 * CHECKPOINT_STEPS},
            "log_every_samples": 10,
        }
    )


@dataclass
class Turns:
    """Two loops that step in turn: a file says whose turn it is.

    Attributes:
        name: of this loop.
        other: of the other one.
        steps: of the whole loop.
        holds_still: what to stop while this loop has its turn.
        took_ms: (number of the step from 1, its milliseconds, those of this thread's own work).
    """

    file: Path
    name: str
    other: str
    steps: int
    holds_still: Callable[[], list[int]] = list
    took_ms: list[tuple[int, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begun_s, self.worked_s, self.still = 0.0, 0.0, []

    def begin(self) -> None:
        while self.file.read_text() != self.name:
            time.sleep(0.002)
        self.still = self.holds_still()
        signal_all(self.still, signal.SIGSTOP)
        self.begun_s, self.worked_s = time.perf_counter(), time.thread_time()

    def after_step(self, _position: int) -> None:
        now_s, worked_s, number = time.perf_counter(), time.thread_time(), len(self.took_ms) + 1
        self.took_ms.append((number, (now_s - self.begun_s) * 1e3, (worked_s - self.worked_s) * 1e3))
        self.begun_s, self.worked_s = now_s, worked_s
        if number == self.steps:
            self.give()
        if number % TURN_STEPS == TURN_STEPS // 2:  # far from checkpoints, which are written beside the steps
            self.give()
            self.begin()

    def give(self) -> None:
        signal_all(self.still, signal.SIGCONT)
        temporary = self.file.with_suffix("." + self.name)
        temporary.write_text(self.other)
        temporary.replace(self.file)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def rays_processes() -> list[int]:
    """All that descends from the bench, but for this process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [os.getppid()]
    while queue:
        below = [pid for pid in children.get(queue.pop(), []) if pid != os.getpid()]
        found += below
        queue += below
    return found


def plain(_rank: int, values: dict[str, Any], port: str, turn: str) -> None:
    """The loop of `model.training.driver.train` without Ray."""
    from model.training.loop import Training
    from model.training.metrics import MetricsLog
    from model.training.report import Reporter

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1)
    config = Stage1Config.model_validate(values)
    turns = Turns(Path(turn), "plain", "ray", config.num_steps, rays_processes)
    training = Training(config, read_index(config.out))
    reporter = Reporter(training, MetricsLog(training.run))
    try:
        turns.begin()
        while training.position < config.total_samples:
            reporter.note(result := training.step())
            if config.is_due(config.log_every_samples, training.position):
                reporter.record(result)
            if config.is_due(config.checkpoint.every_samples, training.position):
                training.writer.wait()
                training.save(reporter.last)
            turns.after_step(training.position)
    finally:
        signal_all(turns.still, signal.SIGCONT)
    training.close()
    (Path(config.out) / "times.json").write_text(json.dumps(turns.took_ms))
    dist.destroy_process_group()


def under_ray(config: Stage1Config, turn: Path) -> None:
    from model.training.driver import fit, train

    place, steps = str(Path(config.out) / "times.json"), config.num_steps

    def timed(words: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        turns = Turns(turn, "ray", "plain", steps)
        turns.begin()
        train(words, after_step=turns.after_step)
        Path(place).write_text(json.dumps(turns.took_ms))

    fit(config, timed, num_groups=5)


def turns_ms(config: Stage1Config, *, own: bool) -> list[float]:
    """Median step of each turn without its checkpoint; of whole turns, after the first."""
    took: dict[int, list[float]] = {}
    for number, whole, worked in json.loads((Path(config.out) / "times.json").read_text()):
        if number % CHECKPOINT_STEPS:
            turn = (number - 1 + TURN_STEPS // 2) // TURN_STEPS
            took.setdefault(turn, []).append(worked if own else whole)
    return [statistics.median(took[turn]) for turn in sorted(took)][1:-1]


def stall_ms(config: Stage1Config) -> float:
    """What a checkpoint holds the training thread up, by the run's own records; the median checkpoint's."""
    records = map(json.loads, (Path(config.out) / "metrics.jsonl").read_text().splitlines())
    steps = config.log_every_samples // config.batch_size
    period = config.checkpoint.every_samples
    after = period + config.log_every_samples  # a save is in the record that follows it
    held = [
        r["checkpoint_s"] * steps * 1e3
        for r in records
        if r["samples"] >= after and (r["samples"] - after) % period == 0
    ]
    return statistics.median(held)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200, help="a multiple of 20")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ray_session(RayConfig(num_cpus=1)):
        folder = Path(name)
        rows = [conftest.prompt_row(n) for n in range(40)]
        conftest.write_shards(folder / "prompts", rows, job="augment", group_rows=8, file_rows=40)
        (folder / "encoder.json").write_text(json.dumps(conftest.write_tiny_encoder(folder)))
        (turn := folder / "turn").write_text("ray")
        configs = {kind: config_for(folder, kind, options.steps) for kind in ("plain", "ray")}
        for config in configs.values():
            prepare_index(config, open_shards(config.prompts))
        beside = mp.spawn(  # pyright: ignore[reportPrivateImportUsage]
            plain, args=(configs["plain"].model_dump(mode="json"), free_port(), str(turn)), join=False
        )
        under_ray(configs["ray"], turn)
        if beside is not None:
            beside.join()
        clocks = {
            name: {kind: turns_ms(config, own=own) for kind, config in configs.items()}
            for name, own in (("the clock", False), ("its own work", True))
        }
        stalls_ms = {kind: stall_ms(config) for kind, config in configs.items()}
    ratios: list[float] = []
    for name, steps in clocks.items():
        medians = ", ".join(f"{kind} {statistics.median(ms):.1f} ms" for kind, ms in steps.items())
        ratios = [ray / bare for ray, bare in zip(steps["ray"], steps["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"a step by {name}: {medians}; ray / plain {middle:.3f} (quartiles {low:.3f}, {high:.3f})")
    stalls = ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in stalls_ms.items())
    print(f"{len(ratios)} pairs of turns; a checkpoint stops the training thread for: {stalls}")


if __name__ == "__main__":
    main()
