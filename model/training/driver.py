"""The driver's part of a training: resources, one TorchTrainer, and a way out for whoever presses Ctrl-C."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from infra.errors import TrainingError
from infra.spare import spare_env
from infra.storage import delete, exists, filesystem, is_remote, join, write_bytes
from model.training.aside import Aside, Place, choose_place
from model.training.checkpoint import last_line
from model.training.door import check_workers
from model.training.notices import STOP, trap_sigterm
from model.training.restarts import note
from model.training.stages import StageConfig
from model.training.telemetry import say

KEEP_MEMORY = {"MIMALLOC_PURGE_DELAY": "-1"}
"""Arrow's allocator keeps what row groups leave behind for the next ones: to fetch memory anew from the system
costs more than to read them, and the loader's cache bounds it."""
Loop = Callable[[dict[str, Any]], None]


def fit(config: StageConfig, loop: Loop, *, num_groups: int) -> None:
    """One TorchTrainer; a dead worker or node restarts the group from the last checkpoint."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1)
    workers = config.num_workers or max(1, gpus)
    check_workers(config, workers, num_groups)
    most = workers if isinstance(workers, int) else workers[1]
    share = config.cpus_per_worker or max(1, int(cpus) // most)
    place = choose_place(config, spare_cpus=cpus - most * share, spare_gpus=gpus - most, uses_gpus=gpus > 0)
    say(f"  validation and previews: {place.words}")
    for leftover in ("checkpoints/checkpoint_manager_snapshot.json", "failure.json", STOP):
        delete(join(config.out, *leftover.split("/")))
    trainer = TorchTrainer(
        loop,
        train_loop_config=loop_words(config, place, threads=max(1, int(share))),
        torch_config=torch_config("cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": share, **({"GPU": 1} if gpus else {})},
        ),
        run_config=RunConfig(
            name="checkpoints",
            worker_runtime_env={"env_vars": spare_env(modules_of(config))},
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[noting(config.out)],
            **storage_of(config.out),  # pyright: ignore[reportArgumentType]
        ),
    )
    try:
        with Aside(config, place), Interrupts(config.out):
            in_thread(trainer.fit)
    except TrainingFailedError as error:
        raise TrainingError(
            f"training stopped after {config.max_failures} restarts: {last_line(error)}"
        ) from error


def loop_words(config: StageConfig, place: Place, *, threads: int) -> dict[str, Any]:
    """What the driver tells each worker.

    `threads` is said because sums depend on it, and a spare has imported torch before Ray could tell it.
    """
    return {
        "stage": config.stage,
        "config": config.model_dump(mode="json"),
        "aside": place.is_aside,
        "threads": int(os.environ.get("OMP_NUM_THREADS", threads)),
    }


def modules_of(config: StageConfig) -> list[str]:
    """What a worker of this run imports: Ray's part, libraries, ours."""
    kinds = {
        "clip": ["open_clip", "model.prompt.clip_encoder"],
        "mllm": ["transformers.models.auto", "model.prompt.mllm_encoder"],
    }
    ray = ["ray.train.torch", "ray.tune", "pyarrow.dataset"]
    logs = ["torch.utils.tensorboard"] if config.log.tensorboard else []
    ours = ["infra.telemetry", "model.training.train", "model.training.observe", "model.training.report"]
    return [*ray, *([] if config.encodings else kinds[config.encoder.kind]), *logs, *ours]


def torch_config(backend: str) -> Any:
    """Ray's process group, in workers that note a SIGTERM instead of dying of it."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):
        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(trap_sigterm)  # runs in the main thread, where signals arrive

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return Config(backend=backend, timeout_s=300)


def noting(run: str) -> Any:
    """What Ray's controller calls when workers have failed: it writes down what of."""
    from ray.train import UserCallback

    class Noting(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            note(run, worker_exceptions)

    return Noting()


def storage_of(run: str) -> dict[str, object]:
    """Ray's words for the run's folder."""
    fs, path = filesystem(run)
    return {"storage_path": path, "storage_filesystem": fs} if is_remote(run) else {"storage_path": path}


SAME_PRESS_S = 1.0
"""Signals so close together are one: what stands between a terminal and us (make, timeout, uv) often passes
Ctrl-C on to a process that the terminal has told already."""


class Interrupts(AbstractContextManager["Interrupts"]):
    """The first Ctrl-C or SIGTERM asks the workers to save and leave, like run/stop; the second leaves at once.

    Raises:
        KeyboardInterrupt: at the end, if the run was asked to leave; or at the second signal.
    """

    def __init__(self, run: str) -> None:
        self.place, self.asked_s = join(run, STOP), math.inf
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None and (self.asked_s < math.inf or exists(self.place)):
            raise KeyboardInterrupt

    def _ask(self, *_: object) -> None:
        now_s = time.monotonic()
        if now_s > self.asked_s + SAME_PRESS_S:
            raise KeyboardInterrupt
        if self.asked_s < math.inf:
            return
        self.asked_s = now_s
        say("  stopping after a last checkpoint; once more to leave at once")
        write_bytes(self.place, b"")


def in_thread(work: Callable[[], object]) -> None:
    """Run `work` beside the main thread, which stays free for signals (Ray's own handler aborts unsaved)."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failed.append(error)

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failed:
        raise failed[0]
