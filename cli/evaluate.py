"""`vimi-train evaluate`: videos are found and decoded, frozen networks look at them, metrics score.

    sample what is missing ─▶ features of each video, cached ─▶ metrics ─▶ scores.json, videos.jsonl

The floors don't know each other: this file hands the one's factories to the other's jobs.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import Field

from infra.certificate import Certificate, file_entries
from infra.cluster import is_cluster, wants_gpus
from infra.config import Incidental, Location
from infra.errors import ConfigError
from infra.progress import say
from infra.storage import join, user_cache, write_bytes, write_json
from model.evaluate.cache import FeatureCache
from model.evaluate.extract import Extractor
from model.evaluate.metric import WARN_N, Features, Metric, Score, Video
from model.evaluate.metrics import METRICS
from model.evaluate.networks import NETWORKS, NetworkConfig, network_of
from model.evaluate.scores import (
    DEFAULT_METRICS,
    Given,
    Setting,
    chosen,
    digest,
    entry,
    folds_of,
    obstacle,
    refuse_small_n,
    score,
)
from pipeline.evaluate.decode import FrameConfig
from pipeline.evaluate.videos import Payload, find_videos, listing_hash
from pipeline.evaluate.worker import EvaluateWorker
from pipeline.job import JobConfig, count_fates, output_hash, run_job, run_units
from pipeline.journal import Receipts, Unit
from pipeline.schema import Status

SCORES, VIDEOS = "scores.json", "videos.jsonl"
SIDES = ("sampled", "real")


class EvaluateConfig(JobConfig):
    """What to score, against what, and by which metrics."""

    videos: Location | None = None
    """Folder of videos to score: any files (with a prompts.jsonl), or the output of `vimi-train sample`."""
    against: Location | None = None
    """Real videos: a folder of files, a crawl's output, or prompt shards, whose targets are taken."""
    metrics: tuple[str, ...] | None = None
    """By name; null = all that need no weights of a hub and that the videos, prompts and references allow."""
    allow_small_n: bool = False
    """Score distributions (FVD, KVD, FID, ...) of fewer than 256 videos too, and mark the scores."""
    frames: FrameConfig = FrameConfig()
    networks: NetworkConfig = NetworkConfig()
    cache: Incidental[Location | None] = None
    """Folder of features, shared by any number of evaluations; null = the user's cache folder, on a cluster a
    folder in `out`."""
    timeout_s: Incidental[float] = Field(default=120.0, gt=0, le=86_400)
    """Of decoding one video."""


@dataclass(frozen=True)
class Plan:
    """What an evaluation will do.

    Attributes:
        videos: payloads of each side.
        metrics: those that can be computed.
        obstacles: why the others can't.
    """

    videos: dict[str, list[Payload]]
    metrics: dict[str, type[Metric]]
    obstacles: dict[str, str]

    @property
    def features(self) -> list[str]:
        return sorted({name for metric in self.metrics.values() for name in metric.needs})

    @property
    def units(self) -> list[Unit]:
        return [
            Unit(f"{side}/{payload['name']}", payload)
            for side in SIDES
            for payload in self.videos.get(side, [])
        ]


def check(config: EvaluateConfig) -> str:
    """Refuse what can't work before anything starts; the plan in words."""
    plan = make_plan(config)
    lines = [f"{len(plan.videos[side]):,} {side} videos" for side in SIDES if side in plan.videos]
    for name in dict.fromkeys(network_of(feature) for feature in plan.features):
        needing = ", ".join(m.name for m in plan.metrics.values() if name in map(network_of, m.needs))
        lines.append(f"{needing}: {NETWORKS[name].find(config.networks)}")
    return "\n".join([*lines, *(f"not {name}: {why}" for name, why in plan.obstacles.items())])


def make_plan(config: EvaluateConfig) -> Plan:
    """Find the videos, and what stands in the way of each metric.

    Raises:
        ConfigError: no videos, none of the metrics can be computed, or too few videos for one that can.
    """
    if config.videos is None:
        raise ConfigError("nothing to evaluate", cure="--videos FOLDER")
    videos = {"sampled": find_videos(config.videos)}
    if config.against is not None:
        videos["real"] = find_videos(config.against)
    return plan_metrics(config, videos)


def plan_metrics(config: EvaluateConfig, videos: dict[str, list[Payload]]) -> Plan:
    """Which metrics can be computed of these videos."""
    prompts = [payload["prompt"] or {} for payload in videos["sampled"]]
    given = Given(
        n=len(videos["sampled"]),
        n_real=len(videos["real"]) if "real" in videos else None,
        has_text=any(prompt.get("text") for prompt in prompts),
        has_references=any(prompt.get("references") for prompt in prompts),
        num_frames=config.frames.num_frames,
    )
    wanted = chosen(config.metrics or DEFAULT_METRICS)
    reasons = {name: obstacle(metric, given, config.networks) for name, metric in wanted.items()}
    obstacles = {name: reason for name, reason in reasons.items() if reason}
    metrics = {name: metric for name, metric in wanted.items() if name not in obstacles}
    if not metrics:
        raise ConfigError("\n".join(f"{name}: {reason}" for name, reason in obstacles.items()))
    if not config.allow_small_n:
        refuse_small_n(metrics.values(), given)
    return Plan(videos, metrics, obstacles)


def run(config: EvaluateConfig) -> Certificate:
    """Score the videos; the same command continues after a kill, and ends in the same bytes."""
    plan = make_plan(config)
    for name, why in plan.obstacles.items():
        say(f"  not {name}: {why}")
    inputs = {side: listing_hash(payloads) for side, payloads in plan.videos.items()}
    work, finish = partial(look, config, plan), partial(write_scores, config, plan, inputs)
    return run_job("evaluate", config, inputs, work=work, finish=finish)


def look(config: EvaluateConfig, plan: Plan) -> Receipts:
    """Features of all videos, on all workers that Ray has."""
    has_gpu = wants_gpus(config.ray)
    make = partial(make_extractor, config, plan.features, "cuda" if has_gpu else "cpu")
    return run_units(
        config.out,
        plan.units,
        partial(EvaluateWorker, make, config.frames, config.timeout_s),
        what="evaluate",
        total=len(plan.units),
        num_workers=config.num_workers,
        units_per_task=4,
        num_gpus=1.0 if has_gpu else 0.0,
        actors=has_gpu,
    )


def make_extractor(config: EvaluateConfig, features: Sequence[str], device: str) -> Extractor:
    """In a worker's process: networks on one thread, since sums depend on how many there are."""
    import torch

    torch.set_num_threads(1)
    seen = config.frames.model_dump(mode="json")
    return Extractor(config.networks, features, open_cache(config), seen, torch.device(device))


def open_cache(config: EvaluateConfig) -> FeatureCache:
    if config.cache is not None:
        return FeatureCache(config.cache)
    return FeatureCache(
        join(config.out, "features") if is_cluster(config.ray) else str(user_cache() / "features")
    )


def write_scores(config: EvaluateConfig, plan: Plan, inputs: dict[str, str], receipts: Receipts) -> Certificate:
    """Metrics of all features, in an order that the videos' content decides; tables, certificate."""
    rows = [
        {"name": payload["name"], "side": side, "text": (payload["prompt"] or {}).get("text"), **receipt}
        for (_, receipt), (side, payload) in zip(
            receipts.in_order(plan.units),
            ((side, payload) for side in SIDES for payload in plan.videos.get(side, [])),
            strict=True,
        )
    ]
    scores, failures = score(plan.metrics, features_of(rows, open_cache(config)))
    setting = setting_of(config, plan, rows)
    obstacles = plan.obstacles | failures
    values = {
        "scores": {name: entry(METRICS[name], found, setting) for name, found in scores.items()},
        "not_computed": obstacles,
        "failed": [
            {key: row[key] for key in ("side", "name", "status", "error")} for row in rows if not is_good(row)
        ],
        "counts": {side: dict(sorted(counts.items())) for side, counts in count_statuses(rows).items()},
        "repeated": repeated(rows),
    }
    write_json(join(config.out, SCORES), values)
    write_bytes(join(config.out, VIDEOS), table_of(rows, scores))
    statuses = Counter(row["status"] for row in rows)
    return Certificate(
        job="evaluate",
        config_hash=output_hash(config, inputs),
        **count_fates(statuses),
        files=file_entries(config.out, [join(config.out, name) for name in (SCORES, VIDEOS)]),
        inputs=inputs,
        facts={"highlights": highlights(values["scores"]), "remarks": remarks(values)},
    )


def is_good(row: dict[str, Any]) -> bool:
    return row["status"] == Status.OK


def features_of(rows: list[dict[str, Any]], cache: FeatureCache) -> Iterator[tuple[Video, Features]]:
    """The good videos with their features, read one after the other."""
    for side in SIDES:
        good = [row for row in rows if row["side"] == side and is_good(row)]
        for row, fold in zip(good, folds_of([row["id"] for row in good]), strict=True):
            own = {name: cache.require(key) for name, key in row["features"].items()}
            prompt = {name: cache.require(key) for name, key in row["prompt"].items()}
            yield Video(row["name"], own, is_real=side == "real", fold=fold), prompt


def setting_of(config: EvaluateConfig, plan: Plan, rows: list[dict[str, Any]]) -> Setting:
    """What the scores depend on; hashes are over contents, not over names or places."""
    import torch

    def of(side: str, key: str) -> str:
        return digest(sorted(str(row[key]) for row in rows if row["side"] == side and is_good(row)))

    counts = count_statuses(rows)
    failed = {side: counts[side].total() - counts[side][Status.OK] for side in counts}
    texts = [row["text"] for row in rows if row["side"] == "sampled"]
    extractor = Extractor(config.networks, plan.features, open_cache(config), {}, torch.device("cpu"))
    return Setting(
        frames=config.frames.model_dump(mode="json"),
        networks=extractor.identities(),
        real=of("real", "id") if "real" in plan.videos else None,
        prompts=digest(sorted(map(str, texts))) if any(texts) else None,
        sampled=of("sampled", "id"),
        system={},
        failed=failed["sampled"],
        failed_real=failed.get("real", 0),
    )


def count_statuses(rows: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    sides = dict.fromkeys(row["side"] for row in rows)
    return {side: Counter(row["status"] for row in rows if row["side"] == side) for side in sides}


def repeated(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Videos of each side whose bytes another one has too: each counts."""
    found = {}
    for side in SIDES:
        ids = Counter(row["id"] for row in rows if row["side"] == side and is_good(row))
        found[side] = sum(count - 1 for count in ids.values())
    return {side: count for side, count in found.items() if count}


def table_of(rows: list[dict[str, Any]], scores: dict[str, Score]) -> bytes:
    """videos.jsonl: every video with its fate and its own values."""
    lines = []
    for row in rows:
        own = {
            n: s.each[row["name"]]
            for n, s in scores.items()
            if row["side"] == "sampled" and row["name"] in s.each
        }
        kept = {key: row.get(key) for key in ("side", "name", "text", "status", "error", "sha256")}
        lines.append(json.dumps({**kept, "scores": own}, sort_keys=True, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def highlights(scores: dict[str, Any]) -> dict[str, str]:
    return {name: in_words(found) for name, found in scores.items()}


def in_words(found: dict[str, Any]) -> str:
    """151.4 [148.2, 154.6] (n 256 and 256 real)."""
    low_high = found["interval"]
    interval = f" [{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else ""
    real = f" and {found['n_real']:,} real" if found["n_real"] is not None else ""
    mark = ", small n" if found["small_n"] else ""
    return f"{found['value']:.5g}{interval} (n {found['n']:,}{real}{mark})"


def remarks(values: dict[str, Any]) -> list[str]:
    """What stands beside the scores: failed videos by name, metrics that have none."""
    failed = values["failed"]
    lines = [f"{row['side']} {row['name']}: {row['status']} ({row['error']})" for row in failed[:10]]
    if len(failed) > 10:
        lines.append(f"and {len(failed) - 10:,} more failed: {SCORES} names them all")
    lines += [f"not {name}: {why}" for name, why in values["not_computed"].items()]
    if any(found["below_advised_n"] for found in values["scores"].values()):
        lines.append(f"below {WARN_N:,} videos, compare only with scores of the same n")
    return lines
