"""Where a run's records also go: TensorBoard, Weights & Biases, Ray's metrics.

    Tracker.write(position, numbers)   the numbers of one record
    Tracker.show(position, pictures)   contact sheets of sampled videos, by title

Each names the numbers as its own pages group them: by what stands before the first slash.
"""

import hashlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from infra.storage import absolute, is_remote
from infra.telemetry import RunMetrics

PASSES = ("data_s", "encode_s", "forward_s", "backward_s", "optimizer_s")
PARTS = (*PASSES, "checkpoint_s")
"""Seconds of a step: of what every step does, and of what a checkpoint held it up."""
SPEEDS = ("samples_per_s", "tflops", "mfu", "data_frac")


class Tracker(Protocol):
    def write(self, position: int, numbers: Mapping[str, float]) -> None: ...

    def show(self, position: int, pictures: Mapping[str, bytes]) -> None: ...

    def close(self) -> None: ...


def grouped(name: str) -> str:
    """`loss` -> `training/loss`, `val/cell video retrieval on q0.5` -> `validation by noise/video ...`."""
    if name.startswith("val/"):
        what, _, of = name.removeprefix("val/").partition(" ")
        group = {"loss": "validation", "cell": "validation by noise"}.get(what, "validation rows")
        return f"{group}/{of or what}"
    group = "seconds of a step" if name in PARTS else "speed" if name in SPEEDS else "training"
    return f"{group}/{name}"


class TensorBoard:
    """run/tensorboard; what an earlier life wrote after `position` is struck out."""

    def __init__(self, run: str, position: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(Path(absolute(run)) / "tensorboard")
        self.writer = SummaryWriter(folder, purge_step=position + 1)

    def write(self, position: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(grouped(name), value, position)

    def show(self, position: int, pictures: Mapping[str, bytes]) -> None:
        for title, png in pictures.items():
            pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
            self.writer.add_image(f"samples/{title}", pixels, position, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One run of theirs for one folder of ours, however often it is resumed."""

    def __init__(self, project: str, name: str, run: str, config: Any) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        folder = tempfile.gettempdir() if is_remote(run) else absolute(run)
        same = hashlib.sha256(run.encode()).hexdigest()[:16]
        self.wandb = wandb
        self.run = wandb.init(project=project, name=name, dir=folder, config=config, id=same, resume="allow")
        self.run.define_metric("*", step_metric="samples")  # validation may arrive late

    def write(self, position: int, numbers: Mapping[str, float]) -> None:
        self.run.log({**{grouped(k): v for k, v in numbers.items()}, "samples": position})

    def show(self, position: int, pictures: Mapping[str, bytes]) -> None:
        sheets = {
            f"samples/{title}": self.wandb.Image(Image.open(io.BytesIO(png))) for title, png in pictures.items()
        }
        self.run.log({**sheets, "samples": position})

    def close(self) -> None:
        self.run.finish()


class RayGauges:
    """Ray's metrics endpoint, which Prometheus reads and infra/grafana/vimi.json plots."""

    def __init__(self, run: str) -> None:
        self.metrics = RunMetrics(run)

    def write(self, position: int, numbers: Mapping[str, float]) -> None:
        by_part = {k.removesuffix("_s"): v for k, v in numbers.items() if k in PARTS}
        losses = {k.removeprefix("val/loss "): v for k, v in numbers.items() if k.startswith("val/loss ")}
        now = {"samples": position} if "loss" in numbers else {}  # validation may be of an earlier moment
        self.metrics.publish({**numbers, **now}, step_s=by_part, validation=losses)

    def show(self, position: int, pictures: Mapping[str, bytes]) -> None:
        """Numbers alone."""

    def close(self) -> None:
        """Ray keeps them."""
