"""Metrics of a run: step timings, metrics.jsonl, and trackers.

    Tracker.write(position, numbers)   the numbers of one record
    Tracker.show(position, pictures)   contact sheets of sampled videos, by title

Each names the numbers as its own pages group them: by what stands before the first slash. A new tracker is a
class and a line in `TRACKERS`.
"""

import hashlib
import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from infra.run_folder import (
    LOSS,
    SCORE,
    SEEN,
    VALIDATION,
    VIDEOS,
    RunFolder,
    is_scored,
    is_validation,
    record_line,
)
from infra.storage import absolute, is_remote, write_bytes
from infra.telemetry import RunMetrics
from infra.validation_cells import SINCE_START, cell_of, cells_of, validation_losses

PASSES = ("data_s", "encode_s", "forward_s", "backward_s", "optimizer_s")
PARTS = (*PASSES, "checkpoint_s")
"""Seconds of a step: of what every step does, and of what a checkpoint held it up."""
SPEEDS = ("samples_per_s", "tflops", "mfu", "data_frac")
WAITS = {"data", "checkpoint"}
"""Parts of a step that the processor waits for; the others are a GPU's, where there is one."""


class Stopwatch:
    """Seconds of a step by part: data, encode, forward, backward, optimizer, checkpoint (what it held up).

    A GPU notes when it came to a part's beginning and end, and is asked when the means are taken: to wait for
    it after each part would leave it without work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.num_steps = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        on_gpu = self.device.type == "cuda" and name not in WAITS
        start, mark = time.perf_counter(), gpu_mark() if on_gpu else None
        try:
            yield
        finally:
            if mark is not None:
                self.marks.append((name, mark, gpu_mark()))
            else:
                self.seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Mean seconds a step by part since the last call, `<part>_s`."""
        for name, begun, ended in self.marks:
            ended.synchronize()
            self.seconds[name] += begun.elapsed_time(ended) / 1e3
        self.marks.clear()
        steps = max(self.num_steps, 1)
        means = {f"{name}_s": total / steps for name, total in self.seconds.items()}
        self.seconds.clear()
        self.num_steps = 0
        return means


def gpu_mark() -> torch.cuda.Event:
    """The moment at which the current stream gets here."""
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


class Tracker(Protocol):
    """Made by `T(run, position=..., argument=..., config=...)`; the argument follows its name's colon."""

    def write(self, position: int, numbers: Mapping[str, float]) -> None: ...

    def show(self, position: int, pictures: Mapping[str, bytes]) -> None: ...

    def close(self) -> None: ...


def grouped(name: str) -> str:
    """`loss` -> `training/loss`, `val/video documents none q0.9` -> `validation by noise/video ...`."""
    if name.startswith(VALIDATION):
        cell, what = cell_of(name), name.removeprefix(VALIDATION)
        if name.startswith(SINCE_START):
            return f"validation/{what}"
        if cell is None:
            return f"validation rows/{what}"
        if cell.is_gain:
            return f"gain by {cell.axis}/{what}"
        return f"{'validation' if cell.quantile is None else 'validation by noise'}/{what}"
    if name.startswith(SEEN):
        return f"samples by task/{name.removeprefix(SEEN)}"
    if name.startswith(SCORE):
        return f"scores/{name.removeprefix(SCORE)}"
    group = "seconds of a step" if name in PARTS else "speed" if name in SPEEDS else "training"
    return f"{group}/{name}"


class TensorBoard:
    """run/tensorboard; what an earlier life wrote after `position` is struck out. Local folders only."""

    package = "tensorboard"

    def __init__(self, run: RunFolder, *, position: int, argument: str, config: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = absolute(run.tensorboard)
        self.writer = None if is_remote(run.uri) else SummaryWriter(folder, purge_step=position + 1)

    def write(self, position: int, numbers: Mapping[str, float]) -> None:
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(grouped(name), value, position)

    def show(self, position: int, pictures: Mapping[str, bytes]) -> None:
        if self.writer is not None:
            for title, png in pictures.items():
                pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
                self.writer.add_image(f"samples/{title}", pixels, position, dataformats="HWC")
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases:
    """One run of theirs for one folder of ours, however often it is resumed."""

    package = "wandb"

    def __init__(self, run: RunFolder, *, position: int, argument: str, config: Any) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        folder = tempfile.gettempdir() if is_remote(run.uri) else absolute(run.uri)
        same = hashlib.sha256(run.uri.encode()).hexdigest()[:16]
        self.wandb = wandb
        self.run = wandb.init(
            project=argument or "vimi", name=run.name, dir=folder, config=config, id=same, resume="allow"
        )
        self.run.define_metric("*", step_metric="samples")

    def write(self, position: int, numbers: Mapping[str, float]) -> None:
        self.run.log({**{grouped(k): v for k, v in numbers.items()}, "samples": position})

    def show(self, position: int, pictures: Mapping[str, bytes]) -> None:
        sheets = {
            f"samples/{title}": self.wandb.Image(Image.open(io.BytesIO(png))) for title, png in pictures.items()
        }
        self.run.log({**sheets, "samples": position})

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""Name in a config -> its class; `package` is what must be installed for it."""


class RayGauges:
    """Ray's metrics endpoint, which Prometheus reads and infra/grafana/vimi.json plots.

    Ray shows a gauge for some reports of its process after it was set, then no more (2 s at a report each half
    second); so the dashboard asks for the last value of the time before.
    """

    def __init__(self, run: str) -> None:
        self.metrics = RunMetrics(run)

    def write(self, position: int, numbers: Mapping[str, float]) -> None:
        by_part = {k.removesuffix("_s"): v for k, v in numbers.items() if k in PARTS}
        now = {"samples": position} if LOSS in numbers else {}
        self.metrics.publish({**numbers, **now}, step_s=by_part, validation=cells_of(numbers))

    def show(self, position: int, pictures: Mapping[str, bytes]) -> None:
        """Numbers alone."""

    def close(self) -> None:
        """Ray lets go of them by itself."""


class MetricsLog:
    """metrics.jsonl and the trackers of one run.

    metrics.jsonl is part of the run's state: opening it cuts it back to `position`, the checkpoint's, so that
    it reads as if nothing had happened.

    Attributes:
        validated, shown, scored: positions that have a record of validation, of sampled videos, of scores.
    """

    def __init__(self, run: RunFolder, trackers: Sequence[Tracker] = (), *, position: int = 0) -> None:
        self.run, self.trackers = run, trackers
        self.records = [record for record in run.records() if record["samples"] <= position]
        self.validated = {record["samples"] for record in self.records if is_validation(record)}
        self.scored = {record["samples"] for record in self.records if is_scored(record)}
        self.shown = {record["samples"] for record in self.records if VIDEOS in record}
        self._put()

    def write(self, position: int, record: dict[str, Any]) -> None:
        """One record at a position: `{"samples": position, ...}`."""
        record = {"samples": position, **record}
        self.records.append(record)
        if not is_remote(self.run.uri):
            with Path(absolute(self.run.metrics)).open("a", encoding="utf-8") as file:
                file.write(record_line(record))
        unsaid = {"samples", VIDEOS}
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in unsaid}
        for tracker in self.trackers:
            tracker.write(position, numbers)

    def show(self, position: int, pictures: dict[str, bytes]) -> None:
        """Contact sheets (PNG, by title) of the videos sampled at a position; the record says how many."""
        self.write(position, {VIDEOS: len(pictures)})
        for tracker in self.trackers:
            tracker.show(position, pictures)

    def flush(self) -> None:
        """Object stores can't append: there the file is put whole, at checkpoints and at the end."""
        if is_remote(self.run.uri):
            self._put()

    def close(self) -> None:
        self.flush()
        for tracker in self.trackers:
            tracker.close()

    def _put(self) -> None:
        write_bytes(self.run.metrics, "".join(map(record_line, self.records)).encode())


def open_trackers(names: Sequence[str], run: RunFolder, *, position: int, config: Any) -> list[Tracker]:
    """The trackers that a config names; `config` (JSON values) is for those that keep it."""
    parts = [name.partition(":") for name in names]
    return [TRACKERS[n](run, position=position, argument=a, config=config) for n, _, a in parts]


def draw_curves(run: RunFolder) -> str | None:
    """Draw run/curves.png (training and validation loss over samples); its place, None without data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = run.records()
    training = [(r["samples"], r[LOSS]) for r in records if LOSS in r]
    if not training:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*training, strict=True), label="training", color="0.6")
    for name in validation_losses(records):
        points = sorted((r["samples"], r[name]) for r in records if name in r)
        axes.plot(*zip(*points, strict=True), marker="o", label=name.removeprefix(VALIDATION))
    axes.set(xlabel="samples", ylabel="loss", yscale="log")
    axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_bytes(run.curves, buffer.getvalue())
    return run.curves
