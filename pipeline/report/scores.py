"""Scores on the page: tables of what may be compared, curves over checkpoints, best and worst videos.

Two numbers stand in one table only if they are of one protocol: the same metric, networks, frames, n, real
videos and prompts. Published rows are of protocols that their papers do not fully tell, so they stand apart.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra.certificate import check_certified, check_files, require_certificate
from infra.claim import read_job_config
from infra.config import canonical_json
from infra.storage import absolute, exists, join, read_bytes, read_json
from pipeline.evaluate.decode import FrameConfig, frames_of
from pipeline.evaluate.videos import Payload, find_videos, list_entries
from pipeline.evaluate.worker import scored_frames, with_target
from pipeline.media.store import open_media, row_errors
from pipeline.report.album import Album
from pipeline.report.charts import Series, line_chart
from pipeline.schema import RowError

NUM_SHOWN, STRIP_FRAMES = 2, 5
"""Best and worst videos of a metric; frames of each. Ours."""
PUBLISHED = [
    ("UCF101, zero-shot", ("FVD", "FID", "IS"), [
        ("Video LDM", ("550.6", "", "33.45")),
        ("Make-A-Video", ("367.2", "", "33.00")),
        ("PYoCo", ("355.2", "", "47.46")),
        ("Snap Video 512x288", ("200.2", "28.1", "38.89")),
    ]),
    ("MSR-VTT", ("CLIP-FID", "FVD", "CLIPSIM"), [
        ("CogVideo (en)", ("23.59", "", ".2631")),
        ("Make-A-Video", ("13.17", "", ".3049")),
        ("PYoCo", ("9.73", "", "")),
        ("Snap Video 512x288", ("9.35", "104.0", ".2793")),
    ]),
    ("MSRVTT-Personalization, subject mode", ("Text-S", "Vid-S", "Subj-S", "Dync-D"), [
        ("ELITE", (".245", ".620", ".359", "")),
        ("VideoBooth", (".222", ".612", ".395", ".448")),
        ("DreamVideo", (".261", ".611", ".310", ".311")),
        ("Video Alchemist", (".269", ".732", ".617", ".466")),
    ]),
]  # fmt: skip
"""Of Snap Video (2402.14797) and Video Alchemist (2501.06187): each with its own networks and n."""
Card = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """An output folder of `vimi-train evaluate`."""

    name: str
    uri: str
    values: dict[str, Any]

    @property
    def videos(self) -> str:
        """Where the scored videos lie."""
        return read_job_config(self.uri)["videos"] or join(self.uri, "videos")

    @property
    def scores(self) -> dict[str, Any]:
        return self.values["scores"]


def read_evaluation(folder: str) -> Evaluation:
    """Scores as they were certified.

    Raises:
        ConfigError: no evaluation there.
        DataError: its files were changed.
    """
    certificate = require_certificate(folder, job="evaluate", made_by="vimi-train evaluate")
    check_files(folder, certificate.files)
    uri = absolute(folder)
    return Evaluation(uri.rpartition("/")[2], uri, read_json(join(uri, "scores.json")))


def score_tables(evaluations: list[Evaluation]) -> list[Card]:
    """A table for each metric and protocol."""
    groups: dict[tuple[str, str], list[tuple[Evaluation, Card]]] = {}
    for evaluation in evaluations:
        for metric, found in evaluation.scores.items():
            groups.setdefault((metric, found["protocol"]), []).append((evaluation, found))
    return [_table(metric, rows) for (metric, _), rows in sorted(groups.items(), key=lambda item: item[0])]


def _table(metric: str, rows: list[tuple[Evaluation, Card]]) -> Card:
    first = rows[0][1]
    manifest = first["manifest"]
    networks = ", ".join(_network(name, facts) for name, facts in manifest["networks"].items())
    real = f" against {first['n_real']:,} real" if first["n_real"] is not None else ""
    frames = manifest["frames"]
    rate = (
        f"{frames['fps']:g} fps"
        if frames["fps"]
        else f"every {frames['stride']}"
        if frames["stride"] > 1
        else ""
    )
    return {
        "metric": metric,
        "protocol": first["protocol"],
        "facts": " · ".join(
            filter(None, [f"n {first['n']:,}{real}", f"{frames['num_frames']} frames", rate, networks])
        ),
        "better": {"lower": "lower is better", "higher": "higher is better"}.get(first["better"], ""),
        "small_n": first["small_n"],
        "rows": [_row(evaluation, found) for evaluation, found in rows],
    }


def _network(name: str, facts: Card) -> str:
    digest = facts.get("sha256") or facts.get("weight_hash") or ""
    return f"{facts.get('name', name)} {digest[:8]}".strip()


def _row(evaluation: Evaluation, found: Card) -> Card:
    interval = found["interval"]
    failed = found["failed"] + (found["failed_real"] or 0)
    return {
        "name": evaluation.name,
        "system": system_in_words(found["manifest"]["system"]),
        "value": f"{found['value']:.5g}",
        "interval": f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "unknown",
        "failed": f"{failed:,} failed" if failed else "",
        "manifest": json.dumps(found["manifest"], indent=1, sort_keys=True, ensure_ascii=False),
    }


def system_in_words(system: Card) -> str:
    """What made the videos, as far as the evaluation knows."""
    if not system:
        return "videos as given"
    position = f" at {system['position']:,} samples" if system.get("position") else ""
    return f"{system['run']}{position}, {settings_in_words(system)}"


def settings_in_words(system: Card) -> str:
    """How a run was sampled."""
    guidance, seeds = system.get("guidance"), system.get("seeds", ())
    if isinstance(guidance, dict):
        guidance = f"{guidance['scheme']} {guidance['weight']:g}"
    told = [
        f"{system['num_steps']} steps" if system.get("num_steps") else "",
        system["ema"],
        f"guidance {guidance}" if guidance else "",
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else "",
    ]
    return ", ".join(filter(None, told))


def missing(evaluations: list[Evaluation]) -> list[str]:
    """What was not computed or not read, a line each."""
    lines = []
    for evaluation in evaluations:
        lines += [f"{evaluation.name}: no {m}: {why}" for m, why in evaluation.values["not_computed"].items()]
        failed = evaluation.values["failed"]
        lines += [
            f"{evaluation.name}: {r['side']} {r['name']}: {r['status']} ({r['error']})" for r in failed[:8]
        ]
        if len(failed) > 8:
            lines.append(f"{evaluation.name}: {len(failed) - 8:,} more failed, named in scores.json")
    return lines


def curves(evaluations: list[Evaluation]) -> list[Card]:
    """Each metric over the checkpoints of a run, where two of them share a protocol and were sampled alike."""
    groups: dict[tuple[str, str, str, str], tuple[Card, list[tuple[int, float]]]] = {}
    for evaluation in evaluations:
        for metric, found in evaluation.scores.items():
            system = found["manifest"]["system"]
            if system.get("position"):
                alike = {name: v for name, v in system.items() if name not in ("position", "checkpoint")}
                key = metric, system["run"], found["protocol"], canonical_json(alike).decode()
                groups.setdefault(key, (system, []))[1].append((system["position"], found["value"]))
    charts = []
    for (metric, run, protocol, _), (system, points) in sorted(groups.items(), key=lambda item: item[0]):
        if len({position for position, _ in points}) > 1:
            x, y = zip(*sorted(points), strict=True)
            title, note = f"{metric} of {run}", f"{settings_in_words(system)} · protocol {protocol}"
            chart = line_chart([Series("", x, y, "v0")], x_label="samples", y_label=metric, title=title)
            charts.append({"title": title, "note": note, "chart": chart})
    return charts


def extremes(evaluation: Evaluation, album: Album) -> Iterator[Card]:
    """The best and the worst videos of its metrics, beside their prompts and references."""
    if not list_entries(absolute(evaluation.videos)):
        return  # they were not kept
    payloads = {payload["name"]: payload for payload in find_videos(evaluation.videos)}
    ranked = {name: found for name, found in evaluation.scores.items() if found["best"]}
    table = read_bytes(join(evaluation.uri, "videos.jsonl")).decode().split("\n")
    rows = {row["name"]: row for row in map(json.loads, filter(None, table)) if row["side"] == "sampled"}
    for metric, found in ranked.items():
        for kind in ("best", "worst"):
            for name in found[kind][:NUM_SHOWN]:
                if name in payloads:
                    value = f"{rows[name]['scores'][metric]:.4g}"
                    facts = f"{evaluation.name} · {kind} {metric} {value} · {name}"
                    yield _video(payloads[name], FrameConfig(**found["manifest"]["frames"]), facts, album)


def _video(payload: Payload, how: FrameConfig, facts: str, album: Album) -> Card:
    """The frames that were scored, beside the prompt."""
    prompt = payload["prompt"] or {}
    references = [place for place in prompt.get("references", []) if exists(place)]
    for place in [*references, *([payload["uri"].removesuffix("#file")] if payload["kind"] == "file" else [])]:
        check_certified(place, must_list=False)
    pictures = [read_bytes(place) for place in references]
    try:
        with row_errors():
            if payload["kind"] == "row":
                payload = with_target(payload, {})
            elif payload["kind"] == "clip":
                open_media(payload["uri"], payload["source_sha256"])  # refuses other bytes
            found = scored_frames(payload, how, frames_of)
            strip = album.filmstrip(found[:: max(1, len(found) // STRIP_FRAMES)][:STRIP_FRAMES], height_px=96)
    except RowError as error:
        strip, facts = None, f"{facts} · can't be read now: {error}"
    return {
        "prompt": prompt.get("text") or "",
        "strip": strip,
        "references": [album.picture(picture, side_px=128) for picture in pictures[:4]],
        "facts": facts,
    }


def scores_part(evaluations: list[Evaluation], album: Album) -> Card | None:
    """All that the page says of scores; None without any."""
    if not evaluations:
        return None
    return {
        "tables": score_tables(evaluations),
        "missing": missing(evaluations),
        "curves": curves(evaluations),
        "videos": [card for evaluation in evaluations for card in extremes(evaluation, album)],
        "published": PUBLISHED,
    }
