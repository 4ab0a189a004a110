"""Reports a running training: records from the workers, a printed line for each in the driver.

Reporter    the records of a rank: loss, speed, time, validation, sampled videos; final.json
RunPrinter  the driver's window on the run's folder, which is what both machines can see
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from infra.certificate import read_sealed, write_sealed
from infra.errors import DataError
from infra.progress import ProgressPrinter, say, span
from infra.run_folder import LOSS, SCORE, SEEN, VIDEOS, RunFolder, is_scored, is_validation
from infra.storage import delete, exists, is_remote, read_json, write_json
from infra.validation_cells import AXES, KEPT, SINCE_START, cells_of
from model.cost import training_flops
from model.data.plan import Plan
from model.generator import Generator
from model.training.loop import StepResult, Training
from model.training.metrics import PASSES, MetricsLog

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bfloat16 peak of a GPU, TFLOP/s, from NVIDIA's data sheets (SXM)."""
MOST_CHARACTERS = 20_000
"""Of one worker's error: a traceback, not a log."""


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Peak of this GPU in FLOP/s; None where we know no peak for it (CPUs, float32)."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in PEAK_TFLOPS.items() if key in name), None)


def flops_per_sample(
    model: Generator,
    seen: Counter[tuple[int, int, int]],
    *,
    prompt_tokens: int,
    references: tuple[int, int, int] = (0, 0, 0),
    self_condition_rate: float,
) -> float:
    """FLOPs of training on a sample, mean over those seen by shape (t, h, w); no credit for recomputation."""
    backbone, condition, total = model.backbone_config, model.condition_config, 0
    for (t, h, w), count in seen.items():
        # Rounded up to 32 tokens (at most 0.12 % of fit-500m's FLOPs, 1 % of fit-tiny's): counted once a run.
        tokens = -(-prompt_tokens // 32) * 32
        parts = training_flops(
            backbone,
            condition,
            prompt_tokens=tokens,
            shape=(t, h, w),
            references=references,
            self_condition_rate=self_condition_rate,
        )
        total += count * parts["total"]
    return total / max(1, seen.total())


class Reporter:
    """Records of one rank's training; ranks but the first have no log and only take part in the means.

    Attributes:
        last: the latest record with a loss.
    """

    def __init__(self, training: Training, log: MetricsLog | None) -> None:
        self.training, self.log = training, log
        self.last: dict[str, Any] = {}
        self.losses: list[torch.Tensor] = []
        self.told_s = 0.0
        self.started_s = self.logged_s = time.perf_counter()
        self.logged_at = self.started_at = training.position

    def note(self, result: StepResult) -> None:
        self.losses.append(result.loss)

    def record(self, result: StepResult) -> None:
        """Mean loss of all ranks since the last record, speed, and where the time went."""
        training = self.training
        loss = training.replica.average(torch.stack(self.losses).mean())
        self.losses.clear()
        now_s = time.perf_counter()
        rate = (training.position - self.logged_at) / max(now_s - self.logged_s, 1e-9)
        parts = training.watch.take()
        self.logged_s, self.logged_at = now_s, training.position
        self.last = {
            LOSS: float(loss),
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "samples_per_s": rate,
            **parts,
            "data_frac": parts.get("data_s", 0.0) / (sum(parts.values()) or 1.0),
            "bad_targets": training.loader.num_bad,
            **samples_by_task(training.loader.plan, training.position),
            **self._throughput(rate),
        }
        self.write(self.last)

    def _throughput(self, samples_per_s: float) -> dict[str, float]:
        """TFLOP/s of all ranks, and MFU on known GPUs."""
        training = self.training
        each = flops_per_sample(
            training.model,
            training.seen,
            prompt_tokens=training.prompt_tokens,
            references=training.references,
            self_condition_rate=training.config.self_condition_rate,
        )
        training.seen.clear()
        rate, peak = each * samples_per_s, peak_flops(training.device, training.replica.dtype)
        return {"tflops": rate / 1e12} | ({"mfu": rate / (peak * training.world_size)} if peak else {})

    def write(self, record: dict[str, Any]) -> None:
        if record and self.log is not None:
            self.log.write(self.training.position, record)

    def show(self, sheets: dict[str, bytes]) -> None:
        """Contact sheets of sampled videos, by title."""
        if self.log is not None:
            self.log.show(self.training.position, sheets)

    def progressed(self, words: dict[str, Any] | None) -> None:
        """How far a validation or a preview is, for the driver to print; None = there is none."""
        now_s, run = time.monotonic(), self.training.run
        if self.log is None or (words is None and self.told_s == 0.0):
            return
        if words is None:
            self.told_s = 0.0
            delete(run.progress)
        elif now_s - self.told_s >= (10.0 if is_remote(run.uri) else 1.0):
            self.told_s = now_s
            write_sealed(run.progress, words | {"samples": self.training.position})

    def finish(self) -> None:
        """final.json: what the certificate quotes; none of a run that left early."""
        training = self.training
        if training.position < training.config.total_samples:
            return
        digest = training.weights_sha256()  # a collective where the weights are sharded
        if self.log is None:
            return
        parameters = sum(p.numel() for p in training.model.parameters())
        wall_s, loss = time.perf_counter() - self.started_s, self.last.get(LOSS)
        rate = (training.position - self.started_at) / max(wall_s, 1e-9)
        highlights = {
            LOSS: f"{loss:.4f}" if loss is not None else "-",
            "parameters": f"{parameters:,}",
            "samples/s": f"{rate:.1f}",
        }
        final = {"weights_sha256": digest, LOSS: loss, "parameters": parameters, "wall_s": wall_s}
        write_sealed(training.run.final, {**final, "highlights": highlights})

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


class RunPrinter:
    """Prints new records, checkpoints and deaths of workers from a run's folder, in a thread, while entered."""

    def __init__(self, run: RunFolder, total: int, *, position: int = 0, every_s: float = 1.0) -> None:
        self.run, self.total = run, total
        self.every_s = 10 * every_s if is_remote(run.uri) else every_s
        self.shown = {_kind(r) for r in run.records() if r["samples"] <= position}
        self.told, self.saved = set(run.restarts()), set(run.positions())
        self.look: tuple[tuple[int, str], ProgressPrinter] | None = None
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "RunPrinter":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._show()

    def _follow(self) -> None:
        while not self.stop.wait(self.every_s):
            self._show()

    def _show(self) -> None:
        """What was not shown before; a torn or vanished file is read again next time."""
        try:
            restarts = {file: read_json(file) for file in self.run.restarts() if file not in self.told}
            records = [r for r in self.run.records() if _kind(r) not in self.shown]
            saved = [position for position in self.run.positions() if position not in self.saved]
            look = read_sealed(self.run.progress) if exists(self.run.progress) else None
        except (OSError, DataError):
            return
        self.told |= set(restarts)
        for restart in restarts.values():
            say(restart_line(restart))
        for record in records:
            self.shown.add(_kind(record))
            say(self._line(record))
        self.saved |= set(saved)
        for position in saved:
            say(f"  saved: {self.run.checkpoint(position)}")
        self._show_look(look)

    def _show_look(self, look: Mapping[str, Any] | None) -> None:
        """How far a validation or a preview is, with its rate and ETA."""
        if look is None:
            self.look = None
            return
        key = look["samples"], look["what"]
        if self.look is None or self.look[0] != key:
            unit = "rows" if look["what"] == "validation" else "sampling steps"
            title = f"{look['what']} at {look['samples']:,} samples"
            self.look = key, ProgressPrinter(title, look["total"], unit=unit)
        printer = self.look[1]
        printer.add(look["done"] - printer.done)

    def _line(self, record: dict[str, Any]) -> str:
        if LOSS in record:
            return progress_line(record, self.total)
        if is_validation(record):
            return validation_line(record)
        position = record["samples"]
        if is_scored(record):
            found = {k.removeprefix(SCORE): v for k, v in record.items() if k.startswith(SCORE)}
            words = [f"{k} {v:.4g}" for k, v in found.items() if not k.endswith((" low", " high"))]
            return f"  scores at {position:,} samples: {', '.join(words)}"
        return f"  videos sampled at {position:,} samples ({record[VIDEOS]}): {self.run.samples(position)}"


def _kind(record: dict[str, Any]) -> tuple[int, bool, bool, bool]:
    return record["samples"], LOSS in record, VIDEOS in record, is_scored(record)


def samples_by_task(plan: Plan, position: int) -> dict[str, int]:
    """Samples of each task so far, `seen/<task>`; {} where there is but one."""
    counts = plan.count_tasks(position)
    return {f"{SEEN}{task}": count for task, count in counts.items()} if len(counts) > 1 else {}


def progress_line(record: dict[str, Any], total: int) -> str:
    """1,600 / 8,000 samples · loss 0.412 · 21.3 samples/s · ETA 5 min · data 1 % encode 4 % ..."""
    position, rate = record["samples"], record["samples_per_s"]
    parts = {k.removesuffix("_s"): v for k, v in record.items() if k in PASSES}
    whole = sum(parts.values()) or 1.0
    words = [
        f"  {position:,} / {total:,} samples",
        f"loss {record[LOSS]:.4f}",
        f"{rate:,.1f} samples/s",
        f"ETA {span((total - position) / rate)}" if rate else "",
        " ".join(f"{name} {value / whole:.0%}" for name, value in parts.items()),
        f"MFU {record['mfu']:.1%}" if "mfu" in record else "",
    ]
    return " · ".join(word for word in words if word)


def validation_line(record: dict[str, Any]) -> str:
    """Losses over all noise levels; and what the best choice gains at the highest, where it says most.

    video right 0.3396, none 0.4119, shuffled 0.4501 (q0.9: none - right +0.0723 ± 0.0041, ...)
    """
    cells = cells_of(record)
    highest = max((cell.quantile for cell in cells if cell.quantile is not None), default=None)
    words = []
    for of in dict.fromkeys(cell.of for cell in cells):
        axes = {cell.axis for cell in cells if cell.of == of}
        axis = "references" if "references" in axes else "documents"
        mine = {cell: value for cell, value in cells.items() if (cell.of, cell.axis) == (of, axis)}
        losses = [
            f"{cell.given} {value:.4f}"
            for cell, value in mine.items()
            if cell.quantile is None and not cell.is_gain
        ]
        gains = [
            f"{cell.given} - {AXES[axis][0]} {value:+.4f}{plus_minus(mine.get(replace(cell, is_error=True)))}"
            for cell, value in mine.items()
            if cell.quantile == highest and cell.is_gain and not cell.is_error
        ]
        words.append(f"{of} {', '.join(losses)}" + (f" (q{highest:g}: {', '.join(gains)})" if gains else ""))
        if of == KEPT and SINCE_START in record:
            more = plus_minus(record.get(f"{SINCE_START} error"))
            words[-1] += f" (since the start {record[SINCE_START]:+.4f}{more})"
    return f"  validation loss at {record['samples']:,} samples: {' · '.join(words)}"


def plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def write_restart(run: RunFolder, errors: Mapping[int, Exception]) -> None:
    """Write down what workers died of, by rank, and the checkpoint where new ones go on."""
    whole = {str(rank): f"{cause(e)}\n\n{e}"[:MOST_CHARACTERS] for rank, e in sorted(errors.items())}
    position = max(run.positions(), default=0)
    write_json(run.restart(int(time.time() * 1e3)), {"position": position, "errors": whole})


def cause(error: BaseException) -> str:
    """One line: the error that user code raised, or what Ray says of a worker that is gone."""
    error = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def restart_line(restart: Mapping[str, Any]) -> str:
    ranks, errors = ", ".join(restart["errors"]), list(restart["errors"].values())
    return (
        f"  worker{'s' if len(errors) > 1 else ''} {ranks} died: {errors[0].splitlines()[0]} "
        f"(a new one goes on from {restart['position']:,} samples; more in restarts/)"
    )
