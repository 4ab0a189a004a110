"""Exports the numbers of jobs and trainings as Ray metrics, for the dashboard and Grafana.

Ray exports them with `ray_` before the name; infra/grafana/vimi.json plots them.

    vimi_units_total{vimi_job}  vimi_rows_total{vimi_job, status}               jobs
    vimi_train_<number>{run}  vimi_train_step_s{run, part}
    vimi_train_validation_loss{run, of, documents, references, noise}
    vimi_train_validation_gain{...}  vimi_train_validation_gain_error{...}      trainings

A tag named `job` would be lost: Prometheus puts the name of its own scrape job there.
"""

from collections.abc import Mapping

from infra.validation_cells import AXES, Cell


class JobMetrics:
    """Counters of one job, tagged with its name; call inside a Ray session."""

    def __init__(self, job: str) -> None:
        from ray.util.metrics import Counter

        self.job = job
        self.units = Counter("vimi_units_total", "finished units of work", tag_keys=("vimi_job",))
        self.rows = Counter("vimi_rows_total", "rows by what became of them", tag_keys=("vimi_job", "status"))

    def add(self, units: int, statuses: dict[str, int]) -> None:
        self.units.inc(units, tags={"vimi_job": self.job})
        for status, count in statuses.items():
            if count:
                self.rows.inc(count, tags={"vimi_job": self.job, "status": status})


class RunMetrics:
    """Gauges of one training run, tagged with its folder; call inside a Ray session."""

    NAMES = ("loss", "grad_norm", "lr", "samples", "samples_per_s", "data_frac", "tflops", "mfu")

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self.run = run
        self.numbers = {
            name: Gauge(f"vimi_train_{name}", f"training: {name}", tag_keys=("run",)) for name in self.NAMES
        }
        self.step_s = Gauge("vimi_train_step_s", "seconds of a step by part", tag_keys=("run", "part"))
        tags = ("run", "of", *AXES, "noise")
        self.loss = Gauge(
            "vimi_train_validation_loss",
            "validation loss by what is given and noise level",
            tag_keys=tags,
        )
        self.gain = Gauge(
            "vimi_train_validation_gain", "what the loss rises by without the right ones", tag_keys=tags
        )
        self.error = Gauge(
            "vimi_train_validation_gain_error", "standard error of that, over the rows", tag_keys=tags
        )

    def publish(
        self, record: Mapping[str, float], *, step_s: Mapping[str, float], validation: Mapping[Cell, float]
    ) -> None:
        """Set those gauges of which there is news."""
        tags = {"run": self.run}
        for name, gauge in self.numbers.items():
            if name in record:
                gauge.set(float(record[name]), tags=tags)
        for part, seconds in step_s.items():
            self.step_s.set(seconds, tags={**tags, "part": part})
        for cell, value in validation.items():
            gauge = self.error if cell.is_error else self.gain if cell.is_gain else self.loss
            noise = "all" if cell.quantile is None else f"q{cell.quantile:g}"
            given = {axis: cell.given if axis == cell.axis else "" for axis in AXES}
            gauge.set(value, tags={**tags, "of": cell.of, **given, "noise": noise})
