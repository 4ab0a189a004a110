"""Loss curves of the runs: raw, smoothed, and the validation beside them."""

from typing import Any

import numpy as np

from pipeline.report.charts import Series, line_chart, short
from pipeline.report.read import Run

MAX_POINTS = 600
"""Points of a line: more can't be seen and only make the page heavy."""


def loss_charts(runs: list[Run]) -> list[dict[str, Any]]:
    return [_loss_chart(run) for run in runs]


def _loss_chart(run: Run) -> dict[str, Any]:
    train = _points(run, "train")
    validation = _points(run, "validation")
    series = []
    if train:
        x, y = [p[0] for p in train], [p[1] for p in train]
        series = [Series("loss", *_thin(x, y), "raw"), Series("smoothed", *_thin(x, smooth(y)), "smooth")]
    if validation:
        series.append(Series("validation", *_thin(*map(list, zip(*validation, strict=True))), "validation"))
    chart = line_chart(series, x_label="samples", y_label="loss", title=f"Loss of {run.name}")
    return {"name": run.name, "chart": chart, "facts": _facts(run, train, validation)}


def _points(run: Run, kind: str) -> list[tuple[float, float]]:
    """(samples, loss) of the records of a kind, in order of samples."""
    found = []
    for record in run.records:
        loss = record.get("loss", record.get("validation_loss"))
        numbers: list[Any] = [record.get("samples"), loss]
        if record.get("kind", "train") == kind and all(map(_number, numbers)):
            found.append((float(numbers[0]), float(numbers[1])))
    return sorted(found)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Median over a window of `share` of the points: outliers of single batches don't bend it."""
    half = max(1, round(len(values) * share / 2))
    array = np.asarray(values, float)
    return [float(np.median(array[max(0, i - half) : i + half + 1])) for i in range(len(array))]


def _thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    step = max(1, -(-len(x) // MAX_POINTS))
    last = [] if (len(x) - 1) % step == 0 else [-1]
    keep = [*range(0, len(x), step), *last]
    return [x[i] for i in keep], [y[i] for i in keep]


def _facts(run: Run, train: list[tuple[float, float]], validation: list[tuple[float, float]]) -> list[str]:
    facts = [f"{short(train[-1][0])} samples"] if train else ["no record yet"]
    if len(train) > 1:
        ends = smooth([loss for _, loss in train])
        facts.append(f"loss {ends[0]:.4g} → {ends[-1]:.4g}")
    if validation:
        facts.append(f"validation {validation[0][1]:.4g} → {validation[-1][1]:.4g}")
    rates = [r["samples_per_s"] for r in run.records if _number(r.get("samples_per_s"))]
    if rates:
        facts.append(f"{float(np.median(rates)):.3g} samples/s")
    facts.append("finished" if run.certificate else "not finished")
    return facts
