"""The numbers of the progress line, as Ray metrics: the dashboard and Grafana show what the terminal shows.

Ray exports them as `ray_vimi_units_total` and `ray_vimi_rows_total`; infra/grafana/vimi.json plots them.
"""


class JobMetrics:
    """Counters of one job, tagged with its name; call inside a Ray session."""

    def __init__(self, job: str) -> None:
        from ray.util.metrics import Counter

        self.job = job
        self.units = Counter("vimi_units_total", "finished units of work", tag_keys=("job",))
        self.rows = Counter("vimi_rows_total", "rows by what became of them", tag_keys=("job", "status"))

    def add(self, units: int, statuses: dict[str, int]) -> None:
        self.units.inc(units, tags={"job": self.job})
        for status, count in statuses.items():
            if count:
                self.rows.inc(count, tags={"job": self.job, "status": status})


class RunMetrics:
    """Gauges of a training run: `ray_vimi_train_loss`, `..._samples`, `..._samples_per_s`, and so on."""

    NAMES = ("loss", "samples", "samples_per_s", "data_frac", "mfu")

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        self.gauges = {name: Gauge(f"vimi_train_{name}", f"training: {name}") for name in self.NAMES}

    def publish(self, record: dict[str, float]) -> None:
        for name, gauge in self.gauges.items():
            if name in record:
                gauge.set(float(record[name]))
