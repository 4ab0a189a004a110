"""What a run says of itself: metrics.jsonl always, and what `trackers` lists beside it.

metrics.jsonl is part of the run's state: a resume cuts it back to the checkpoint's position, so that it
reads as if nothing had happened. Validation beside the loop arrives late, under its checkpoint's position.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.config import Config
from infra.storage import absolute, exists, is_remote, join, read_bytes, write_bytes
from model.training.trackers import TensorBoard, Tracker, WeightsAndBiases


class LogConfig(Config):
    """Where metrics go; none of it changes the training."""

    every_samples: int = Field(default=80, ge=1)
    """Samples between two records and two progress lines."""
    tensorboard: bool = True
    """Write run/tensorboard (local run folders only)."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases (pip install vimi[wandb]); None = don't."""


class MetricsLog:
    """Writes records on rank 0; does nothing elsewhere."""

    def __init__(
        self,
        run: str,
        config: LogConfig,
        *,
        enabled: bool,
        position: int,
        name: str,
        flat_config: Any,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """`trackers` are told beside those that `config` names."""
        self.enabled, self.run = enabled, run
        self.trackers = list(trackers)
        self.lines: list[str] = []
        self.validated: set[int] = set()
        """Positions that have a record of validation."""
        self.shown: set[int] = set()
        """Positions whose sampled videos were shown."""
        if not enabled:
            return
        self.place = join(run, "metrics.jsonl")
        self.lines = _before(self.place, position)
        for record in map(json.loads, self.lines):
            self._remember(record)
        self.flush(whole=True)
        if config.tensorboard and not is_remote(run):
            self.trackers.append(TensorBoard(run, position))
        if config.wandb_project:
            self.trackers.append(WeightsAndBiases(config.wandb_project, name, run, flat_config))

    def write(self, position: int, record: dict[str, Any]) -> None:
        """One record at a position: `{"samples": position, ...}`."""
        if not self.enabled:
            return
        record = {"samples": position, **record}
        line = json.dumps(record)
        self.lines.append(line)
        self._remember(record)
        if not is_remote(self.run):
            with Path(absolute(self.place)).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        unsaid = {"samples", "videos"}
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in unsaid}
        for tracker in self.trackers:
            tracker.write(position, numbers)

    def show(self, position: int, pictures: dict[str, bytes]) -> None:
        """Contact sheets (PNG, by title) of the videos sampled at a position; the record says how many."""
        self.write(position, {"videos": len(pictures)})
        for tracker in self.trackers:
            tracker.show(position, pictures)

    def _remember(self, record: dict[str, Any]) -> None:
        if is_validation(record):
            self.validated.add(record["samples"])
        if is_sampling(record):
            self.shown.add(record["samples"])

    def flush(self, *, whole: bool = False) -> None:
        """Object stores can't append: there the file is put whole, at checkpoints."""
        if self.enabled and (whole or is_remote(self.run)):
            write_bytes(self.place, "".join(line + "\n" for line in self.lines).encode())

    def close(self) -> None:
        self.flush()
        for tracker in self.trackers:
            tracker.close()


def _before(place: str, position: int) -> list[str]:
    """The whole lines of an earlier life up to `position`; a torn last line is dropped."""
    if not exists(place):
        return []
    lines = read_bytes(place).decode("utf-8", "replace").split("\n")[:-1]
    return [line for line in lines if json.loads(line)["samples"] <= position]


def read_metrics(run: str) -> list[dict[str, Any]]:
    """The records of a run, in order."""
    place = join(run, "metrics.jsonl")
    if not exists(place):
        return []
    return [json.loads(line) for line in read_bytes(place).decode().splitlines()]


def is_validation(record: dict[str, Any]) -> bool:
    return any(name.startswith("val/") for name in record)


def is_sampling(record: dict[str, Any]) -> bool:
    """Whether it says that videos were sampled."""
    return "videos" in record


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def draw_curves(run: str) -> str | None:
    """Draw run/curves.png (training and validation loss over samples); its place, None without data."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run)
    training = [(r["samples"], r["loss"]) for r in records if "loss" in r]
    if not training:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), label="training", color="0.6")
    names = sorted({k for r in records for k in r if k.startswith("val/loss")})
    for name in names:
        points = sorted((r["samples"], r[name]) for r in records if name in r)
        axes.plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("val/"))
    axes.set(xlabel="samples", ylabel="loss", yscale="log")
    axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    place = join(run, "curves.png")
    write_bytes(place, buffer.getvalue())
    return place
