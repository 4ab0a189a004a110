"""Runs that tests of training share: open, advance, fingerprint; a driver as a process of its own; ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from infra.run_folder import RunFolder
from infra.storage import write_json
from model.data.shards import open_shards
from model.training.checkpoint import load_state, tensors_in
from model.training.config import Stage1Config, StageConfig
from model.training.loop import Training
from model.training.preflight import prepare_index, read_index
from model.training.state import hash_tensors, state_of, weights_of
from tests.processes import descendants

ROOT = Path(__file__).parents[2]
CODE = "from cli.train import main; main()"


def open_training(config: StageConfig) -> Training:
    prepare_index(config, open_shards(config.prompts))
    return Training(config, read_index(config.out))


def advance(training: Training, steps: int) -> None:
    for _ in range(steps):
        training.step()


def fingerprint(training: Training) -> dict[str, Any]:
    """Weights, optimizer, averages and the next ten batches, as hashes."""
    state = state_of(training.model, training.optimizer, training.emas)
    plan, start = training.loader.plan, training.position
    sources = map(plan.source, range(start, start + 10 * training.config.batch_size))
    return {
        "state": hash_tensors({k: v for k, v in state.items() if k != "rng"}),
        "ids": [[source.group, source.row] for source in sources],
        "position": training.position,
    }


def unbroken(config: StageConfig, steps: int) -> dict[str, Any]:
    training = open_training(config)
    advance(training, steps)
    found = fingerprint(training)
    training.close()
    return found


def whole_weights_sha256(config: StageConfig, out: Path) -> str:
    """Of the same run to its end, in one go, without Ray."""
    training = open_training(config.model_copy(update={"out": str(out)}))
    advance(training, config.num_steps)
    found = training.weights_sha256()
    training.close()
    return found


class Driver:
    """`vimi-train stage1` in a process of its own, as a user starts it."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.folder, self.run = folder, Path(values["out"])
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        log = (folder / "driver.log").open("ab")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CODE, "stage1", "--config", str(folder / "config.yaml")]
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        log.close()

    @property
    def log(self) -> str:
        return (self.folder / "driver.log").read_text()

    def wait_for_samples(self, samples: int) -> None:
        """Until the run has logged that position."""
        for _ in range(6000):  # five minutes: a busy machine starts slowly
            assert self.process.poll() is None, self.log[-2000:]
            if any(position >= samples for position in logged(self.run)):
                return
            time.sleep(0.05)
        raise AssertionError(f"the run did not get to {samples} samples: {self.log[-2000:]}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> int:
        """Its exit code."""
        return self.process.wait(timeout=240)

    def worker(self) -> int:
        """Pid of the Ray Train worker that descends from this driver."""
        for pid, name in descendants(self.process.pid).items():
            if "RayTrainWorker" in name:
                return pid
        raise AssertionError("no training worker")


def logged(run: Path) -> list[int]:
    """Positions of the records of training, a torn last line left out."""
    place = run / "metrics.jsonl"
    lines = place.read_text().split("\n")[:-1] if place.exists() else []
    return [record["samples"] for record in map(json.loads, lines) if "loss" in record]


def trained_positions(run: str) -> list[int]:
    return [record["samples"] for record in RunFolder(run).records() if "loss" in record]


def on_ranks(world: int, values: dict[str, Any], report: Path, steps: int) -> dict[str, Any]:
    """Plain torch.distributed on gloo; what rank 0 found: row ids of each step, hash of the weights."""
    mp.spawn(_rank, args=(world, free_port(), values, str(report), steps), nprocs=world)  # pyright: ignore
    return json.loads(report.read_text())


def _rank(rank: int, world: int, port: str, values: dict[str, Any], report: str, steps: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    config = Stage1Config.model_validate(values)
    if rank == 0:
        prepare_index(config, open_shards(config.prompts))
    dist.barrier()
    training = Training(config, read_index(config.out))
    ids = []
    for _ in range(steps):
        ids.append(next_rows(training))
        training.step()
    training.save({})
    training.writer.wait()
    digest = training.weights_sha256()
    if rank == 0:
        write_json(report, {"ids": ids, "sha": digest, "position": training.position})
    training.close()
    dist.barrier()
    dist.destroy_process_group()


def alone(values: dict[str, Any], steps: int) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Rows of each step and the weights after them, on one rank."""
    training = open_training(Stage1Config.model_validate(values))
    ids = []
    for _ in range(steps):
        ids.append(next_rows(training))
        training.step()
    weights = {name: value.clone() for name, value in weights_of(training.model).items()}
    training.close()
    return ids, weights


def relative_distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|one - other| / |other| over all tensors together."""
    names = sorted(other)
    mine, theirs = (torch.cat([side[n].double().flatten() for n in names]) for side in (one, other))
    return float((mine - theirs).norm() / theirs.norm())


def next_rows(training: Training) -> list[list[int]]:
    """(row group, row) of every sample of the coming step, over all ranks."""
    start = training.position
    sources = map(training.loader.plan.source, range(start, start + training.config.batch_size))
    return [[source.group, source.row] for source in sources]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def weights_at(run: str) -> dict[str, torch.Tensor]:
    """The model's tensors in the run's last checkpoint."""
    uri = RunFolder(run).latest_checkpoint() or ""
    state = {k: torch.zeros(s) for k, s in tensors_in(uri).items() if k.startswith("model.")}
    load_state(uri, state)
    return state


def stumble(words: dict[str, Any], at: int, marker: str) -> Callable[[int], None]:
    """User code for after each step: fails once, when the run gets to `at` samples."""

    def after_step(position: int) -> None:
        if position == at and not Path(marker).exists():
            Path(marker).touch()
            raise ValueError("a mistake in user code")

    return after_step


def die_at_each_step(folder: Path) -> Callable[[int], None]:
    """For after each step: SIGKILL, the first time that the run gets there."""

    def after_step(position: int) -> None:
        marker = folder / str(position)
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return after_step
