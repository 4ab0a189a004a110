"""The page's charts: distributions of the corpus and of what retrieval made of it, losses of the trainings.

A record of `metrics.jsonl` is `{"samples": n, "loss": x, ...}`, or a validation's, whose keys
`infra.validation_cells` names.
"""

import re
from collections import Counter
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from infra.run_folder import HELD_OUT, LOSS, SCORE, SEEN, VALIDATION
from infra.validation_cells import (
    AXES,
    DOCUMENTS,
    KEPT,
    SINCE_START,
    Cell,
    cells_of,
    rows_name,
    validation_losses,
)
from pipeline.memory.vectors import cosines, vectors_numpy
from pipeline.report.charts import Series, difference_chart, histogram, line_chart, short
from pipeline.report.read import MAX_ROWS, Parts, Run, read_columns
from pipeline.schema import Media, Status
from pipeline.shards import ShardSet

Chart = dict[str, Any]
Curve = list[tuple[float, float]]
PAIRS = 4000
"""Random pairs: enough for the mean's standard error to be below 0.002."""
MOST_BARS = 8
"""The others are one bar."""
MAX_POINTS = 600
"""Points of a line: more can't be seen and only make the page heavy."""
SCORE_KEY = re.compile(rf"{SCORE}(?P<metric>\S+)(?: (?P<task>\w+))? n(?P<n>\d+)")
"""A metric of sampled videos in a run's records; the ends of its interval have longer keys."""
VALIDATION_STYLES = ("v0", "v1", "v2", "v3", "v4", "v5")


def distributions(parts: Parts) -> list[Chart]:
    """The charts that the parts at hand allow."""
    charts: list[Chart] = []
    if parts.clips:
        charts += _clip_charts(parts.clips)
    if parts.prompts:
        charts += _prompt_charts(parts, parts.prompts)
        if not parts.clips:
            captions = _read_shards(parts.prompts, ["caption"])["caption"]
            charts.append(_caption_lengths(captions))
    charts = [chart for chart in charts if chart["chart"] or chart.get("bars")]
    return sorted(charts, key=lambda chart: "bars" in chart)


def _clip_charts(folder: str) -> list[Chart]:
    columns = ["media", "caption", "start_s", "end_s", "width_px", "height_px", "status"]
    table = read_columns(folder, columns)
    good = table.filter(pc.field("status") == Status.OK.value)
    if not len(good):
        return []
    videos = good.filter(pc.field("media") == Media.VIDEO.value)
    seconds = videos["end_s"].to_numpy() - videos["start_s"].to_numpy()
    sides = zip(good["width_px"].to_pylist(), good["height_px"].to_pylist(), strict=True)
    sizes = Counter(f"{width}×{height}" for width, height in sides if width)
    return [
        _histogram("Duration of the clips", "seconds", [("clips", seconds, "one")]),
        _caption_lengths(good["caption"]),
        _bars("Resolution", sizes, "clips"),
    ]


def _caption_lengths(captions: pa.ChunkedArray) -> Chart:
    words = [len(text.split()) for text in captions.to_pylist() if text]
    return _histogram("Length of the captions", "words", [("captions", words, "one")])


def _prompt_charts(parts: Parts, shards: ShardSet) -> list[Chart]:
    documents = _documents(shards)
    similarities = [d["clip_similarity"] for d in documents if d["clip_similarity"] is not None]
    random = _random_similarities(parts.memory) if parts.memory else []
    compared = [("random pairs", random, "two")] if len(random) else []
    similarity = _histogram(
        "CLIP similarity of caption and retrieved picture",
        "cosine",
        [*compared, ("retrieved", similarities, "one")],
    )
    if len(random) and similarities:
        lead = float(np.mean(similarities)) - float(np.mean(random))
        similarity["note"] = (
            f"Mean {np.mean(similarities):.3f} retrieved, {np.mean(random):.3f} random: {lead:+.3f}. "
            "A random pair is the text of one document with the picture of another."
        )
    charts = [similarity]
    for name in sorted({str(d["retriever"]) for d in documents}):
        scores = [d["score"] for d in documents if d["retriever"] == name and d["score"] is not None]
        charts.append(_histogram(f"Score of the documents ({name})", "score", [(name, scores, "one")]))
    counts = Counter(_read_shards(shards, ["num_documents"])["num_documents"].to_pylist())
    charts.append(_bars("Documents of a prompt", {str(k): counts[k] for k in sorted(counts)}, "prompts"))
    counted = parts.certificates["augment"][1].facts.get("refused", {})
    if refused := {reason: count for reason, count in counted.items() if count}:
        charts.append(_bars("Documents that were not given, by reason", refused, "candidates"))
    return charts


def _documents(shards: ShardSet) -> list[dict[str, Any]]:
    """One origin for each retrieved document (its text and its picture carry the same)."""
    column = _read_shards(shards, ["segments.list.element.type", "segments.list.element.document"])
    found = []
    for segments in column["segments"].to_pylist():
        seen = set()
        for segment in segments or []:
            origin = segment["document"]
            if origin and (origin["doc_id"], origin["rank"]) not in seen:
                seen.add((origin["doc_id"], origin["rank"]))
                found.append(origin)
    return found


def _read_shards(shards: ShardSet, columns: list[str]) -> pa.Table:
    step = max(1, -(-shards.num_rows // MAX_ROWS))
    parts = [shards.read_row_group(i, columns) for i in range(0, len(shards), step)]
    empty = pa.table({name.partition(".")[0]: pa.nulls(0) for name in columns})
    return pa.concat_tables(parts) if parts else empty


def _random_similarities(memory: str) -> np.ndarray:
    """Cosines of texts and pictures of different documents of the memory, in its own CLIP space."""
    from pipeline.memory import open_memory

    found = open_memory(memory, read_through=False).sample
    rows, random = len(found), np.random.default_rng(0)
    if rows < 2:
        return np.empty(0)
    columns = ("text_embedding", "image_embedding")
    texts, pictures = (vectors_numpy(found[name].combine_chunks()) for name in columns)
    shift = 1 + random.integers(0, rows - 1, size=rows)
    others = (np.arange(rows) + shift) % rows
    return cosines(texts, pictures[others])[texts.any(1) & pictures[others].any(1)]


def _histogram(title: str, x_label: str, values: list[tuple[str, Any, str]]) -> Chart:
    series = [Series(name, [float(v) for v in found], [], style) for name, found, style in values]
    chart = histogram(series, x_label=x_label, title=f"Histogram: {title}")
    legend = [(s.style, s.name) for s in series] if len(series) > 1 else []
    note = ""
    if len(series) == 1 and series[0].x:
        low, middle, high = np.percentile(series[0].x, [5, 50, 95])
        note = f"{len(series[0].x):,} values; median {middle:.3g}, 90 % between {low:.3g} and {high:.3g}."
    return {"title": title, "chart": chart, "legend": legend, "note": note}


def _bars(title: str, counts: dict[str, int], unit: str) -> Chart:
    """Horizontal bars in HTML, largest first unless the keys are numbers."""
    items = list(counts.items())
    if not all(key.isdigit() for key in counts):
        items = sorted(items, key=lambda item: -item[1])
    rest = sum(count for _, count in items[MOST_BARS:])
    items = items[:MOST_BARS] + ([("other", rest)] if rest else [])
    top, total = max((n for _, n in items), default=1), max(sum(counts.values()), 1)
    bars = [{"name": name, "count": n, "width": 100 * n / max(top, 1), "share": n / total} for name, n in items]
    return {"title": title, "chart": Markup(), "bars": bars, "note": f"{total:,} {unit}."}


def loss_charts(runs: list[Run]) -> list[Chart]:
    """Loss curves of the runs: raw, smoothed, and the validation losses beside them."""
    return [_loss_chart(run) for run in runs]


def _loss_chart(run: Run) -> dict[str, Any]:
    train = curve(run.records, LOSS)
    kind = "validation, " if held_out(run.records) else "training rows, "
    validation = [
        (kind + name.removeprefix(VALIDATION), curve(run.records, name))
        for name in validation_losses(run.records)
    ]
    series = []
    if train:
        x, y = [p[0] for p in train], [p[1] for p in train]
        series = [Series("", *_thin(x, y), "raw"), Series("training", *_thin(x, smooth(y)), "smooth")]
    for (name, points), style in zip(validation, VALIDATION_STYLES, strict=False):
        x, y = [p[0] for p in points], [p[1] for p in points]
        series.append(Series(name, *_thin(x, y), style))
    chart = line_chart(series, x_label="samples", y_label="loss", title=f"Loss of {run.name}")
    legend = [(s.style, s.name) for s in series if s.name] if validation else []
    return {"name": run.name, "chart": chart, "legend": legend, "facts": _facts(run, train)}


def held_out(records: list[dict[str, Any]]) -> bool:
    """Whether validation read rows that were kept from training; a small corpus has none to spare."""
    return all(record.get(HELD_OUT, 1) for record in records)


def document_tables(runs: list[Run]) -> list[Chart]:
    """The last validation of each run, by medium and task: loss by noise level and documents, with errors."""
    return [table for run in runs for table in _document_tables(run)]


def task_tables(runs: list[Run]) -> list[Chart]:
    """Of runs of several tasks: each one's loss with all that its prompts show and with nothing; its share."""
    return [table for run in runs for table in _task_tables(run)]


def kept_tables(runs: list[Run]) -> list[Chart]:
    """Of runs of stage 2, what they keep of stage 1: the loss of its rows before the first step and now."""
    return [table for run in runs for table in _kept_tables(run)]


def score_tables(runs: list[Run]) -> list[Chart]:
    """Metrics of the videos that runs sampled while training (`validation.metrics`), over all and by task."""
    return [table for run in runs for table in _score_tables(run)]


def _score_tables(run: Run) -> list[Chart]:
    keys = dict.fromkeys(key for record in run.records for key in record)
    found = [match for key in keys if (match := SCORE_KEY.fullmatch(key)) and curve(run.records, key)]
    tables = []
    for metric in dict.fromkeys(match["metric"] for match in found):
        series, rows = [], []
        mine = [match for match in found if match["metric"] == metric]
        for match, style in zip(mine, cycle(VALIDATION_STYLES), strict=False):
            points, name = curve(run.records, match[0]), _task(match["task"] or "all")
            low, high = (curve(run.records, f"{match[0]} {end}") for end in ("low", "high"))
            between = f"{low[-1][1]:.4g} to {high[-1][1]:.4g}" if low and high else "–"
            series.append(Series(name, [x for x, _ in points], [y for _, y in points], style))
            rows.append((name, [match["n"], f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}", between]))
        tables.append(
            {
                "title": f"{metric} of {run.name}",
                "note": f"at {max(series[0].x):,.0f} samples",
                "chart": line_chart(series, x_label="samples", y_label=metric, title=f"{metric} of {run.name}"),
                "legend": [(one.style, one.name) for one in series],
                "first": "task",
                "columns": ["videos", "at first", "now", "interval"],
                "rows": rows,
            }
        )
    return tables


def _kept_tables(run: Run) -> list[Chart]:
    records = [record for record in run.records if Cell(KEPT, "right").name in record]
    if not records:
        return []
    first, last = cells_of(records[0]), cells_of(records[-1])
    rows = []
    for cell in (cell for cell in last if cell.of == KEPT):
        before, now = first.get(cell, last[cell]), last[cell]
        error = records[-1].get(f"{SINCE_START} error") if cell.quantile is None else None
        difference = f"{now - before:+.4f}" + (f" ± {error:.4f}" if _number(error) else "")
        level = "all" if cell.quantile is None else f"q{cell.quantile:g}"
        rows.append((level, [f"{before:.4f}", f"{now:.4f}", difference]))
    points = curve(run.records, Cell(KEPT, "right").name)
    series = [Series("", [x for x, _ in points], [y for _, y in points], "v0")]
    title = f"Text-to-video loss of {run.name} on stage 1's rows"
    count = records[-1].get(rows_name(KEPT), "?")
    at = f"{records[0].get('samples', 0):,} samples"
    return [
        {
            "title": f"{run.name}, what it keeps of stage 1",
            "note": f"{count} rows at {records[-1].get('samples', 0):,} samples",
            "chart": line_chart(series, x_label="samples", y_label="loss", title=title),
            "legend": [],
            "first": "noise",
            "columns": [f"at {at}", "now", "difference"],
            "rows": [*rows[1:], rows[0]],  # all levels last, as in the other tables
        }
    ]


def _task_tables(run: Run) -> list[Chart]:
    last = last_validation(run)
    cells = {cell: value for cell, value in cells_of(last).items() if cell.axis == "references"}
    given, names = AXES["references"], list(dict.fromkeys(cell.of for cell in cells))
    if not names:
        return []
    counts = next((seen for record in reversed(run.records) if (seen := _seen(record))), {})
    series = []
    for (of, name), style in zip(product(names, given), VALIDATION_STYLES, strict=False):
        points = curve(run.records, Cell(of, name, axis="references").name)
        shown = "shown" if name == given[0] else "nothing shown"
        series.append(Series(f"{_task(of)}, {shown}", [x for x, _ in points], [y for _, y in points], style))
    rows = [(_task(of), [*_share(counts, of), *_task_cells(of, cells)]) for of in names]
    kind = "held-out rows" if held_out([last]) else "training rows"
    return [
        {
            "title": f"{run.name}, by task",
            "note": f"{kind} at {last.get('samples', 0):,} samples",
            "chart": line_chart(series, x_label="samples", y_label="loss", title=f"Loss by task of {run.name}"),
            "legend": [(one.style, one.name) for one in series],
            "first": "task",
            "columns": ["samples", "share", "shown", "nothing shown", "difference"],
            "rows": rows,
        }
    ]


def _task(of: str) -> str:
    """`video subject_driven` -> `subject driven`; a medium other than video stays in front."""
    return of.removeprefix("video ").replace("_", " ")


def _seen(record: dict[str, Any]) -> dict[str, int]:
    return {name.removeprefix(SEEN): n for name, n in record.items() if name.startswith(SEEN) and _number(n)}


def _share(counts: dict[str, int], of: str) -> list[str]:
    """Samples of the task so far, and their share of all."""
    count, total = counts.get(of.partition(" ")[2]), sum(counts.values())
    return ["–", "–"] if count is None else [f"{count:,}", f"{count / max(total, 1):.1%}"]


def _task_cells(of: str, cells: dict[Cell, float]) -> list[str]:
    own, none = AXES["references"]
    there = [Cell(of, given, axis="references") for given in (own, none)]
    return [_cell_text(cell, cells) for cell in (*there, replace(there[1], is_gain=True))]


def last_validation(run: Run) -> dict[str, Any]:
    """The record of the run's last validation; empty before the first."""
    return next((record for record in reversed(run.records) if cells_of(record)), {})


def _document_tables(run: Run) -> list[Chart]:
    last = last_validation(run)
    cells = {cell: value for cell, value in cells_of(last).items() if cell.axis == "documents"}
    kind = "held-out rows" if held_out([last]) else "training rows"
    tables = []
    for of in dict.fromkeys(cell.of for cell in cells):
        mine = {cell: value for cell, value in cells.items() if cell.of == of}
        if not any(cell.is_gain for cell in mine):
            continue  # no documents to compare
        about = {
            "title": f"{run.name}, {of.replace('_', ' ')}",
            "note": f"{last.get(rows_name(of), '?')} {kind} at {last.get('samples', 0):,} samples",
        }
        tables.append(about | _document_table(run, of, mine))
    return tables


def _document_table(run: Run, of: str, cells: dict[Cell, float]) -> Chart:
    """Chart of the gains and a table of all, of one medium or task."""
    losses = [name for name in DOCUMENTS if Cell(of, name) in cells]
    gains = [name for name in DOCUMENTS if Cell(of, name, is_gain=True) in cells]
    levels = sorted({cell.quantile for cell in cells if cell.quantile is not None})
    series = [_gain_series(of, name, levels, cells) for name in gains]
    chart = difference_chart(
        series,
        x_label="quantile of the noise levels",
        y_label="loss more than right",
        title=f"What documents are worth to {run.name}, {of}",
    )
    rows = [
        (
            "all" if level is None else f"q{level:g}",
            [
                *(_cell_text(Cell(of, name, level), cells) for name in losses),
                *(_cell_text(Cell(of, name, level, is_gain=True), cells) for name in gains),
            ],
        )
        for level in (*levels, None)
    ]
    return {
        "chart": chart,
        "legend": [(one.style, one.name) for one in series],
        "first": "noise",
        "columns": [*losses, *(f"{name} − right" for name in gains)],
        "rows": rows,
    }


def _gain_series(of: str, name: str, levels: list[float], cells: dict[Cell, float]) -> Series:
    there = [Cell(of, name, level, is_gain=True) for level in levels]
    there = [cell for cell in there if _number(cells.get(cell))]
    errors = [cells.get(replace(cell, is_error=True)) for cell in there]
    return Series(
        f"{name} − right",
        [cell.quantile or 0.0 for cell in there],
        [cells[cell] for cell in there],
        name,
        [error for error in errors if error is not None] if None not in errors else (),
    )


def _cell_text(cell: Cell, cells: dict[Cell, float]) -> str:
    """`0.3396`; of a gain `+0.0723 ± 0.0041`."""
    value, error = cells.get(cell), cells.get(replace(cell, is_error=True))
    if value is None:
        return "–"
    if not cell.is_gain:
        return f"{value:.4f}"
    return f"{value:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def curve(records: list[dict[str, Any]], key: str) -> Curve:
    """(samples, value) of the records that have both, in order of samples."""
    found = [(record.get("samples"), record.get(key)) for record in records]
    return sorted((float(x), float(y)) for x, y in found if _number(x) and _number(y))  # type: ignore[arg-type]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def smooth(values: list[float]) -> list[float]:
    """Median over a window of a tenth of the points: outliers of single batches don't bend it."""
    half = round(len(values) / 20)
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
