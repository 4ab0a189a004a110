"""The driver's window on a run: a line for each record of metrics.jsonl and for each worker that died.

The loop runs in a worker, maybe on another machine; the run's folder is what both can see.
"""

import threading
from typing import Any

from infra.progress import span
from infra.storage import is_remote
from model.training.restarts import restarts
from model.training.sampled import preview_uri
from model.training.telemetry import is_sampling, is_validation, read_metrics, say
from model.training.trackers import PASSES


class Follower:
    """Prints what is new, from a thread, while it is entered."""

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


def validation_line(record: dict[str, Any]) -> str:
    values = {k.removeprefix("val/loss "): v for k, v in record.items() if k.startswith("val/loss ")}
    words = " · ".join(f"{name} {value:.4f}" for name, value in values.items())
    return f"  validation loss at {record['samples']:,} samples: {words}"
