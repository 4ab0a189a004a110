"""Where validation and previews run, and the driver's thread that gives checkpoints to Ray tasks.

Ray Train's own asynchronous validation was read before this was written (ray 2.60, `ValidationManager`): it
forgets what is pending when a driver starts anew, and a validation whose process dies (out of memory, a lost
node) fails the training. Here the run's folder is the queue, and a failed validation is a line in the log.
"""

import threading
from dataclasses import dataclass
from typing import Any

from infra.storage import is_remote
from model.training.checkpoint import last_line
from model.training.observe import awaited, give_up
from model.training.stages import StageConfig, config_class
from model.training.telemetry import say


@dataclass(frozen=True)
class Place:
    """Where validation and previews run.

    Attributes:
        words: for the log.
        options: of the Ray task; None = in the loop.
    """

    words: str
    options: dict[str, Any] | None = None

    @property
    def is_aside(self) -> bool:
        return self.options is not None


def choose_place(config: StageConfig, *, spare_cpus: float, spare_gpus: float, uses_gpus: bool) -> Place:
    """Beside the loop if the session has room for it, or if the config wants it there."""
    if not (config.validation.num_samples or config.preview.num_videos):
        return Place("no validation, no previews")
    wanted, kind = config.observe, "GPU" if uses_gpus else "CPU"
    spare = spare_gpus if uses_gpus else spare_cpus
    if wanted == "background":
        return Place("on a CPU, with the lowest priority", {"num_cpus": 0})
    if wanted == "spare" or (wanted == "auto" and spare >= 1):
        options = {"num_cpus": 1, **({"num_gpus": 1} if uses_gpus else {})}
        waits = "" if spare >= 1 else f", when one is free (none is now: {spare:g})"
        return Place(f"on a {kind} of their own{waits}", options)
    why = f": no {kind} is free beside training" if wanted == "auto" else ""
    return Place(f"in the loop, which waits{why}")


class Aside:
    """Looks for checkpoints that are due and gives them, oldest first and one at a time, to a Ray task.

    Leaving the context without an error waits until none is awaited.
    """

    def __init__(self, config: StageConfig, place: Place) -> None:
        self.config, self.options = config, place.options
        self.every_s = 10.0 if is_remote(config.out) else 1.0
        self.closing, self.abandoned = threading.Event(), False
        self.thread = threading.Thread(target=self._serve, name="aside", daemon=True)

    def __enter__(self) -> "Aside":
        if self.options is not None:
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.abandoned = kind is not None
        self.closing.set()
        if self.options is not None and not self.abandoned:
            left = len(awaited(self.config))
            if left:
                say(f"  waiting for validation and previews of {left} checkpoints")
            self.thread.join()

    def _serve(self) -> None:
        while True:
            closing = self.closing.is_set()  # before looking: training writes nothing after it
            waiting = awaited(self.config)
            if waiting and not self.abandoned:
                self._observe(waiting[0])
            elif closing:
                return
            else:
                self.closing.wait(self.every_s)

    def _observe(self, position: int) -> None:
        import ray

        words = {"stage": self.config.stage, "config": self.config.model_dump(mode="json")}
        options = {**(self.options or {}), "max_retries": 1}
        try:
            ray.get(ray.remote(observe_beside).options(**options).remote(words, position, options))
        except Exception as error:  # noqa: BLE001 - whatever it was, training goes on
            if self.abandoned:
                return  # the session ends under the task: the next driver does it
            say(f"  no validation at {position:,} samples: {last_line(error)}")
            give_up(self.config, position, last_line(error))


def observe_beside(words: dict[str, Any], position: int, options: dict[str, Any]) -> None:
    """The Ray task: one checkpoint, in a process of its own."""
    import os

    import torch

    from model.training.observe import observe_checkpoint
    from model.training.parallel import pick_device

    if not options["num_cpus"]:
        os.nice(19)
    torch.set_num_threads(1)
    config = config_class(words["stage"]).model_validate(words["config"])
    device = pick_device() if options.get("num_gpus") else torch.device("cpu")
    observe_checkpoint(config, position, device)
