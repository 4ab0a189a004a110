"""Loss curves of the runs: raw, smoothed, and the validation losses beside them.

A record of `metrics.jsonl` is `{"samples": n, "loss": x, ...}`; validation losses are its keys
`val/loss <what>`, e.g. `val/loss video retrieval on`.
"""

from typing import Any

import numpy as np

from pipeline.report.charts import Series, line_chart, short
from pipeline.report.read import Run

MAX_POINTS = 600
"""Points of a line: more can't be seen and only make the page heavy."""
VALIDATION = "val/loss "
STYLES = ("v0", "v1", "v2", "v3")
Curve = list[tuple[float, float]]


def loss_charts(runs: list[Run]) -> list[dict[str, Any]]:
    return [_loss_chart(run) for run in runs]


def _loss_chart(run: Run) -> dict[str, Any]:
    train = curve(run.records, "loss")
    names = sorted({k for r in run.records for k in r if k.startswith(VALIDATION)}, key=lambda k: (len(k), k))
    held_out = all(record.get("val/held_out", 1) for record in run.records)
    kind = "validation, " if held_out else "training rows, "  # too few rows to hold any out
    validation = [(kind + name.removeprefix(VALIDATION), curve(run.records, name)) for name in names]
    series = []
    if train:
        x, y = [p[0] for p in train], [p[1] for p in train]
        series = [Series("", *_thin(x, y), "raw"), Series("training", *_thin(x, smooth(y)), "smooth")]
    for (name, points), style in zip(validation, STYLES, strict=False):
        x, y = [p[0] for p in points], [p[1] for p in points]
        series.append(Series(name, *_thin(x, y), style))
    chart = line_chart(series, x_label="samples", y_label="loss", title=f"Loss of {run.name}")
    legend = [(s.style, s.name) for s in series if s.name] if validation else []
    return {"name": run.name, "chart": chart, "legend": legend, "facts": _facts(run, train)}


def curve(records: list[dict[str, Any]], key: str) -> Curve:
    """(samples, value) of the records that have both, in order of samples."""
    found = [(record.get("samples"), record.get(key)) for record in records]
    return sorted((float(x), float(y)) for x, y in found if _number(x) and _number(y))  # type: ignore[arg-type]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def smooth(values: list[float], share: float = 0.1) -> list[float]:
    """Median over a window of `share` of the points: outliers of single batches don't bend it."""
    half = round(len(values) * share / 2)
    array = np.asarray(values, float)
    return [float(np.median(array[max(0, i - half) : i + half + 1])) for i in range(len(array))]


def _thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    step = max(1, -(-len(x) // MAX_POINTS))
    keep = [*range(0, len(x), step)]
    if len(x) and keep[-1] != len(x) - 1:
        keep.append(len(x) - 1)
    return [x[i] for i in keep], [y[i] for i in keep]


def _facts(run: Run, train: Curve) -> list[str]:
    facts = [f"{short(train[-1][0])} samples"] if train else []
    if len(train) > 1:
        ends = smooth([loss for _, loss in train])
        facts.append(f"training loss {ends[0]:.4g} → {ends[-1]:.4g}")
    rates = [rate for _, rate in curve(run.records, "samples_per_s")]
    if rates:
        facts.append(f"{float(np.median(rates)):.3g} samples/s")
    return [*facts, "finished" if run.certificate else "not finished"]
