"""What a run says of itself: metrics.jsonl always, and what `trackers` lists beside it.

metrics.jsonl is part of the run's state: a resume cuts it back to the checkpoint's position, so that it
reads as if nothing had happened. Validation beside the loop arrives late, under its checkpoint's position.
"""

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from infra.config import Config
from infra.progress import span
from infra.storage import absolute, exists, is_remote, join, read_bytes, write_bytes
from model.training.restarts import restarts
from model.training.sampled import preview_uri
from model.training.trackers import PASSES, TensorBoard, Tracker, WeightsAndBiases


class LogConfig(Config):
    """Where metrics go; none of it changes the training."""

    every_samples: int = Field(default=80, ge=1)
    """Samples between two records and two progress lines."""
    tensorboard: bool = True
    """Write run/tensorboard (local run folders only)."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases (pip install vimi[wandb]); None = don't."""


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


def progress_line(record: dict[str, Any], total: int) -> str:
    """1,600 / 8,000 samples · loss 0.412 · 21.3 samples/s · ETA 5 min · data 1 % encode 4 % ..."""
    position = record["samples"]
    rate = record["samples_per_s"]
    parts = {k.removesuffix("_s"): v for k, v in record.items() if k in PASSES}
    whole = sum(parts.values()) or 1.0
    shares = " ".join(f"{name} {value / whole:.0%}" for name, value in parts.items())
    words = [
        f"  {position:,} / {total:,} samples",
        f"loss {record['loss']:.4f}",
        f"{rate:,.1f} samples/s",
        f"ETA {span((total - position) / rate)}" if rate else "",
        shares,
        f"MFU {record['mfu']:.1%}" if "mfu" in record else "",
    ]
    return " · ".join(word for word in words if word)


class Follower:
    """The driver's window on a run: prints a line for each new record of metrics.jsonl.

    The loop runs in a worker, maybe on another machine; the run's folder is what both can see.
    """

    def __init__(self, run: str, total: int, *, position: int = 0, every_s: float = 1.0) -> None:
        self.run, self.total, self.every_s = run, total, every_s
        self.shown = {_kind(r) for r in read_metrics(run) if r["samples"] <= position}
        self.told = set(restarts(run))
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Follower":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._show()

    def _follow(self) -> None:
        while not self.stop.wait(self.every_s if not is_remote(self.run) else 10 * self.every_s):
            self._show()

    def _show(self) -> None:
        """What was not shown before; a torn or vanished file is read again next time."""
        try:
            fresh = restarts(self.run, self.told)
            records = [r for r in read_metrics(self.run) if _kind(r) not in self.shown]
        except (OSError, ValueError):
            return
        self.told |= set(fresh)
        for text in fresh.values():
            say(text)
        for record in records:
            self.shown.add(_kind(record))
            say(self._line(record))

    def _line(self, record: dict[str, Any]) -> str:
        if "loss" in record:
            return progress_line(record, self.total)
        if is_validation(record):
            return validation_line(record)
        position = record["samples"]
        return (
            f"  videos sampled at {position:,} samples ({record['videos']}): {preview_uri(self.run, position)}"
        )


def _kind(record: dict[str, Any]) -> tuple[int, bool, bool]:
    return record["samples"], "loss" in record, is_sampling(record)


def is_validation(record: dict[str, Any]) -> bool:
    return any(name.startswith("val/") for name in record)


def is_sampling(record: dict[str, Any]) -> bool:
    """Whether it says that videos were sampled."""
    return "videos" in record


def validation_line(record: dict[str, Any]) -> str:
    values = {k.removeprefix("val/loss "): v for k, v in record.items() if k.startswith("val/loss ")}
    words = " · ".join(f"{name} {value:.4f}" for name, value in values.items())
    return f"  validation loss at {record['samples']:,} samples: {words}"


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
