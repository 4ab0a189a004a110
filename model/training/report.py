"""What is said of a run and when: the loop's memory of time, kept out of the loop."""

import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from infra.storage import is_remote, join, write_json
from model.cost.flops import sizes, training_flops
from model.training.due import What, is_due, is_observed
from model.training.loop import Outcome, Training
from model.training.observe import read_results
from model.training.sampled import contact_sheets, sampled_positions
from model.training.stages import StageConfig
from model.training.telemetry import MetricsLog
from model.training.trackers import Tracker

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bfloat16 peak of a GPU, TFLOP/s, from NVIDIA's data sheets (SXM)."""


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak of this GPU in FLOP/s; None where we know no peak for it (CPUs, float32)."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in PEAK_TFLOPS.items() if key in name), None)


class Reporter:
    """Progress lines, metrics.jsonl and its like, final.json.

    Attributes:
        last: the latest record with a loss.
    """

    def __init__(self, training: Training, *, aside: bool, trackers: Sequence[Tracker] = ()) -> None:
        """`aside`: checkpoints are looked at beside the loop, so those must be written too."""
        self.training, self.aside = training, aside
        config = training.config
        self.rank_zero = training.rank == 0
        self.log_to = open_log(config, training.position, enabled=self.rank_zero, trackers=trackers)
        self.last: dict[str, Any] = {}
        self.losses: list[torch.Tensor] = []
        self.started_s = self.logged_s = time.perf_counter()
        self.logged_at = self.started_at = training.position

    def is_due(self, what: What) -> bool:
        config, position = self.training.config, self.training.position
        if what == "checkpoint" and self.aside and is_observed(config, position):
            return True
        return is_due(config, what, position)

    def note(self, outcome: Outcome) -> None:
        self.losses.append(outcome.loss)

    def log(self, outcome: Outcome) -> None:
        """Mean loss of all ranks since the last record, speed, and where the time went."""
        training = self.training
        loss = training.replica.average(torch.stack(self.losses).mean())
        self.losses.clear()
        now_s = time.perf_counter()
        elapsed_s = max(now_s - self.logged_s, 1e-9)
        parts = training.watch.take()
        record = {
            "loss": float(loss),
            "grad_norm": outcome.grad_norm,
            "lr": outcome.lr,
            "samples_per_s": (training.position - self.logged_at) / elapsed_s,
            **parts,
            "data_frac": parts.get("data_s", 0.0) / (sum(parts.values()) or 1.0),
            "bad_targets": training.loader.num_bad,
        }
        record |= self._throughput(record["samples_per_s"])
        self.logged_s, self.logged_at = now_s, training.position
        self.last = record
        self.write(record)
        if not is_remote(training.config.out) or self.is_due("checkpoint"):
            self._collect()

    def _throughput(self, samples_per_s: float) -> dict[str, float]:
        """TFLOP/s of all ranks by the exact table (no credit for recomputation), and MFU on known GPUs."""
        config, seen = self.training.config, self.training.seen
        total = sum(count * self._flops(shape) for shape, count in seen.items())
        rate = total / max(1, seen.total()) * samples_per_s
        seen.clear()
        peak = peak_flops(self.training.device, config.parallel.dtype)
        found = {"tflops": rate / 1e12}
        return found | ({"mfu": rate / (peak * self.training.world_size)} if peak else {})

    def _flops(self, shape: tuple[int, int, int]) -> int:
        """FLOPs of training on one sample of a bucket's shape (t, h, w)."""
        model, tokens = self.training.model, self.training.prompt_tokens
        backbone, condition, (t, *size) = model.backbone_config, model.condition_config, shape
        counts = sizes(backbone, condition, prompt_tokens=tokens, num_frames=t, size_px=(size[0], size[1]))
        rate = self.training.config.self_condition_rate
        parts = training_flops(backbone, condition, counts, prompt_tokens=tokens, self_condition_rate=rate)
        return sum(parts.values())

    def _collect(self) -> None:
        if self.rank_zero:
            collect(self.log_to, self.training.config.out, self.training.position)

    def write(self, record: dict[str, Any]) -> None:
        if record:
            self.log_to.write(self.training.position, record)

    def finish(self) -> None:
        """final.json: what the certificate quotes; none of a run that left early."""
        self._collect()
        if self.training.position < self.training.config.total_samples:
            return
        digest = self.training.weights_sha256()  # a collective where the weights are sharded
        if not self.rank_zero:
            return
        parameters = sum(p.numel() for p in self.training.model.parameters())
        seen = self.training.position - self.started_at
        wall_s = time.perf_counter() - self.started_s
        loss = self.last.get("loss")
        write_json(
            join(self.training.config.out, "final.json"),
            {
                "weights_sha256": digest,
                "loss": loss,
                "parameters": parameters,
                "wall_s": wall_s,
                "highlights": {
                    "loss": f"{loss:.4f}" if loss is not None else "-",
                    "parameters": f"{parameters:,}",
                    "samples/s": f"{seen / max(wall_s, 1e-9):.1f}",
                },
            },
        )

    def close(self) -> None:
        self.log_to.close()


def open_log(
    config: StageConfig, position: int, *, enabled: bool = True, trackers: Sequence[Tracker] = ()
) -> MetricsLog:
    """The run's log, cut back to `position`."""
    return MetricsLog(
        config.out,
        config.log,
        enabled=enabled,
        position=position,
        name=f"{config.stage} {config.out.rpartition('/')[2]}",
        flat_config=config.model_dump(mode="json"),
        trackers=trackers,
    )


def collect(log: MetricsLog, run: str, position: int) -> None:
    """Put into the log what lies in the run's folder and is not yet there: validations and videos."""
    for samples, record in read_results(run, log.validated):
        if samples <= position:
            log.write(samples, record)
    for samples in unshown(run, log.shown):
        if samples <= position:
            log.show(samples, contact_sheets(run, samples))


def unshown(run: str, shown: Collection[int]) -> list[int]:
    """Positions whose sampled videos are there and not among the shown ones."""
    return [p for p in sampled_positions(run) if p not in shown]
