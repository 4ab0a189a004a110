"""`vimi-train evaluate`: videos are found and decoded, frozen networks look at them, metrics score.

    sample what is missing ─▶ features of each video, cached ─▶ metrics ─▶ scores.json, videos.jsonl

The floors don't know each other: this file hands the one's factories to the other's jobs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import Field

from infra.certificate import Certificate, FileEntry, file_entries
from infra.cluster import is_cluster, wants_gpus
from infra.config import Incidental, Location, NameOrFolder
from infra.errors import ConfigError
from infra.progress import say
from infra.samples import SAMPLES
from infra.storage import check_writable, exists, join, user_cache, write_bytes, write_json
from model.data.shards import open_shards
from model.evaluate.extract import Extractor, FeatureCache
from model.evaluate.metric import Metric
from model.evaluate.networks import NETWORKS, NetworkConfig, network_of
from model.evaluate.results import SIDES, make_results, remarks
from model.evaluate.sampling import (
    SampleWorker,
    batches,
    learned_with_documents,
    planned,
    prompt_facts,
    system_of,
    system_of_samples,
    video_name,
)
from model.evaluate.scores import DEFAULT_METRICS, Given, chosen, digest, obstacles, refuse_small_n, too_few
from model.sampling import generate
from model.sampling.plan import SampleConfig, made_by, weights_hash
from model.sampling.plan import check as check_sampling
from model.sampling.requests import prompt_hash
from pipeline.evaluate.decode import FrameConfig
from pipeline.evaluate.videos import Payload, find_videos, listing_hash
from pipeline.evaluate.worker import EvaluateWorker
from pipeline.job import JobConfig, count_fates, output_hash, run_job, run_units
from pipeline.journal import Receipts, Unit

SCORES, TABLE, SAMPLED = "scores.json", "videos.jsonl", "videos"


class EvaluateConfig(JobConfig):
    """What to score, against what, and by which metrics."""

    run: Incidental[Location | None] = None
    """Folder of a stage1 or stage2 run, or one of its checkpoints: its videos are sampled first."""
    base: Incidental[NameOrFolder | None] = None
    """In place of a run a pretrained model as it is, as in `vimi-train sample`: what a training starts from."""
    prompts: Incidental[Location | None] = None
    """With `run`: folder of prompt shards, such as `vimi-data benchmark` makes; their documents come with
    them, and their targets are the real videos unless `against` names others."""
    rows: int | None = Field(default=None, ge=1, le=10_000_000)
    """How many of the prompts; null = all."""
    sample: dict[str, Any] = Field(default_factory=dict)
    """With `run`: fields of `vimi-train sample`, e.g. {num_steps: 64, seeds: [0]}."""
    videos: Incidental[Location | None] = None
    """Folder of videos to score: any files (with a prompts.jsonl), or the output of `vimi-train sample`."""
    against: Incidental[Location | None] = None
    """Real videos: a folder of files, a crawl's output, or prompt shards, whose targets are taken."""
    metrics: tuple[str, ...] | None = None
    """By name; null = all that need no weights of a hub and that the videos, their number, their prompts and
    references allow."""
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
        videos: payloads of each side; those of a run are names until they are sampled.
        metrics: those that can be computed.
        obstacles: why the others can't.
        inputs: name -> content hash.
        sample: how the run's videos are sampled; None without a run.
        system: what makes them, for the manifest.
    """

    videos: dict[str, list[Payload]]
    metrics: dict[str, type[Metric]]
    obstacles: dict[str, str]
    inputs: dict[str, str]
    sample: SampleConfig | None = None
    system: dict[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> list[str]:
        return sorted({name for metric in self.metrics.values() for name in metric.needs})

    @property
    def payloads(self) -> list[tuple[str, Payload]]:
        return [(side, payload) for side in SIDES for payload in self.videos.get(side, [])]

    @property
    def units(self) -> list[Unit]:
        return [Unit(f"{side}/{payload['name']}", payload) for side, payload in self.payloads]


def check(config: EvaluateConfig) -> str:
    """Refuse what can't work before anything starts; the plan in words."""
    plan = make_plan(config)
    lines = [f"{len(plan.videos[side]):,} {side} videos" for side in SIDES if side in plan.videos]
    if config.against is not None and "real" not in plan.videos:
        lines.append("the real videos are not read: none of these metrics compares with them")
    if plan.sample is not None:
        lines.append(f"to sample: {check_sampling(plan.sample)}")
    for name in dict.fromkeys(network_of(feature) for feature in plan.features):
        needing = ", ".join(m.name for m in plan.metrics.values() if name in map(network_of, m.needs))
        lines.append(f"{needing}: {NETWORKS[name].find(config.networks)}")
    return "\n".join([*lines, *(f"not {name}: {why}" for name, why in plan.obstacles.items())])


def make_plan(config: EvaluateConfig) -> Plan:
    """Find the videos, and what stands in the way of each metric.

    Raises:
        ConfigError: no videos, none of the metrics can be computed, or too few videos for one that can.
    """
    words = {"run": "a run", "base": "a base model", "videos": "videos"}
    said = [word for name, word in words.items() if getattr(config, name) is not None]
    if len(said) != 1:
        raise ConfigError(
            " and ".join(said) if said else "nothing to evaluate",
            legal="a run or a base model, whose videos are sampled, or a folder of videos",
            cure="RUN --prompts SHARDS, --base MODEL --prompts SHARDS, or --videos FOLDER",
        )
    idle = [name for name in ("prompts", "rows", "sample") if getattr(config, name)]
    if config.videos is not None and idle:
        raise ConfigError(
            f"{' and '.join(idle)} with videos that are there already",
            legal="with a run, or a base model, whose videos are sampled",
            cure="leave it out; a prompts.jsonl beside the videos says what they show",
        )
    plan = plan_run(config) if config.videos is None else plan_folder(config.videos)
    against = config.against or (config.prompts if plan.sample else None)
    if against is not None:
        own = (
            {payload["prompt_id"] for payload in plan.videos["sampled"]} if against == config.prompts else None
        )
        real = find_videos(against, only=own)
        plan.videos["real"], plan.inputs["real"] = real, listing_hash(real)
    return plan_metrics(config, plan)


def plan_folder(videos: str) -> Plan:
    """Videos that are there; those of `vimi-train sample` say what made them."""
    found = find_videos(videos)
    system = system_of_samples(videos) if exists(join(videos, SAMPLES)) else {}
    return Plan({"sampled": found}, {}, {}, {"sampled": listing_hash(found)}, system=system)


def plan_run(config: EvaluateConfig) -> Plan:
    """The videos that a run will make; nothing is loaded but the prompts.

    Raises:
        ConfigError: no prompts, or what `vimi-train sample` would refuse.
    """
    sample = sample_config(config)
    check_sampling(sample)
    base, requests = planned(sample)
    refuse_short(config.frames, sample.num_frames or base.num_frames)
    learned, number = learned_with_documents(base, requests)
    if learned and not number:
        say("  note: the run has learned with documents, and no prompt has any")
    checkpoint = weights_hash(sample, made_by(sample)[0])
    videos = [
        {"name": f"{video_name(n)}.mp4", "prompt_id": request.prompt_id, "prompt": prompt_facts(request.prompt)}
        for n, request in enumerate(requests)
    ]
    inputs = {"checkpoint": checkpoint, "prompts": digest([prompt_hash(r.prompt) for r in requests])}
    return Plan({"sampled": videos}, {}, {}, inputs, sample, system_of(sample, checkpoint, number))


def refuse_short(scored: FrameConfig, num_frames: int) -> None:
    """Refuse to sample videos that have fewer frames than are scored.

    Raises:
        ConfigError: says how many would do.
    """
    needed = 1 + (scored.num_frames - 1) * scored.stride
    if scored.fps is None and num_frames < needed:
        raise ConfigError(
            f"videos of {num_frames} frames, of which the first {needed} would be scored",
            legal=f"at most {num_frames}",
            cure=f"--set frames.num_frames={num_frames} --set frames.stride=1",
        )


def sample_config(config: EvaluateConfig) -> SampleConfig:
    """How `vimi-train sample` would be asked for these videos."""
    source = {"run": config.run, "base": config.base}
    fields: dict[str, Any] = {**source, "out": join(config.out, SAMPLED), **config.sample}
    if config.prompts is not None:
        rows = config.rows or open_shards(config.prompts).num_rows
        fields |= {"prompts_uri": config.prompts, "rows": rows}
    return SampleConfig.load(options=fields)


def plan_metrics(config: EvaluateConfig, plan: Plan) -> Plan:
    """Which metrics can be computed of the plan's videos."""
    prompts = [payload["prompt"] or {} for payload in plan.videos["sampled"]]
    given = Given(
        n=len(prompts),
        n_real=len(plan.videos["real"]) if "real" in plan.videos else None,
        has_text=any(prompt.get("text") for prompt in prompts),
        has_references=any(prompt.get("references") for prompt in prompts),
        has_words=any(any(prompt.get("words", ())) for prompt in prompts),
        num_frames=config.frames.num_frames,
    )
    wanted = chosen(config.metrics or DEFAULT_METRICS)
    reasons = obstacles(wanted, given, config.networks)
    if config.metrics is None and not config.allow_small_n:
        possible = [metric for name, metric in wanted.items() if name not in reasons]
        reasons |= too_few(possible, given)
    metrics = {name: metric for name, metric in wanted.items() if name not in reasons}
    if not metrics:
        raise ConfigError(*(f"{name}: {reason}" for name, reason in reasons.items()))
    if not config.allow_small_n:
        refuse_small_n(metrics.values(), given)
    return compared(replace(plan, metrics=metrics, obstacles=reasons))


def compared(plan: Plan) -> Plan:
    """The plan with the features of real videos that a metric compares; without such videos if none does.

    No metric reads the prompts of real videos, so a picture that theirs lack costs nothing.
    """
    needed = sorted({name for metric in plan.metrics.values() if metric.needs_real for name in metric.needs})
    videos, inputs = dict(plan.videos), dict(plan.inputs)
    real = videos.pop("real", [])
    if real and needed:
        videos["real"] = [{**payload, "prompt": None, "features": needed} for payload in real]
    else:
        inputs.pop("real", None)
    return replace(plan, videos=videos, inputs=inputs)


def run(config: EvaluateConfig) -> Certificate:
    """Score the videos; the same command continues after a kill, and ends in the same bytes."""
    plan = make_plan(config)
    for name, why in plan.obstacles.items():
        say(f"  not {name}: {why}")
    check_writable(open_cache(config).folder, cure="choose another cache, or mend its permissions")
    work, finish = partial(look, config, plan), partial(write_scores, config, plan)
    return run_job("evaluate", config, plan.inputs, work=work, finish=finish)


def look(config: EvaluateConfig, plan: Plan) -> Receipts:
    """Features of all videos, on all workers that Ray has; those of a run are sampled first."""
    has_gpu = wants_gpus(config.ray)
    workers: dict[str, Any] = {"num_workers": config.num_workers, "actors": has_gpu, "num_gpus": float(has_gpu)}
    if plan.sample is not None:
        make_videos(config, plan.sample, plan, workers)
    make = partial(make_extractor, config, plan.features, "cuda" if has_gpu else "cpu")
    units = sampled(plan).units
    worker = partial(EvaluateWorker, make, config.frames, config.timeout_s)
    return run_units(config.out, units, worker, what="evaluate", total=len(units), units_per_task=4, **workers)


def make_videos(config: EvaluateConfig, sample: SampleConfig, plan: Plan, workers: dict[str, Any]) -> None:
    """Sample what is missing into the folder `videos` of the output."""
    count = len(plan.videos["sampled"])
    units = [Unit(f"sample/{payload['first']:06d}", payload) for payload in batches(sample, count)]
    worker = partial(SampleWorker, sample)
    receipts = run_units(config.out, units, worker, what="sample", total=len(units), **workers)
    made = [receipt for _, receipt in receipts.in_order(units)]
    entries = [entry for receipt in made for entry in receipt["entries"]]
    files = [FileEntry(**file) for receipt in made for file in receipt["files"]]
    generate.certify(sample, made_by(sample)[0], entries, files, inputs=plan.inputs)


def sampled(plan: Plan) -> Plan:
    """The plan with the files of a run's videos, now that they are there."""
    if plan.sample is None:
        return plan
    return replace(plan, videos={**plan.videos, "sampled": find_videos(plan.sample.out)})


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


def write_scores(config: EvaluateConfig, plan: Plan, receipts: Receipts) -> Certificate:
    """Metrics of all features; their tables, and the certificate."""
    plan = sampled(plan)
    rows = [
        {"side": side, "name": payload["name"], "text": (payload["prompt"] or {}).get("text"), **receipt}
        for (_, receipt), (side, payload) in zip(receipts.in_order(plan.units), plan.payloads, strict=True)
    ]
    values, table = make_results(
        rows,
        plan.metrics,
        plan.obstacles,
        cache=open_cache(config),
        networks=config.networks,
        frames=config.frames.model_dump(mode="json"),
        system=plan.system,
        allow_small_n=config.allow_small_n,
    )
    write_json(join(config.out, SCORES), values)
    write_bytes(join(config.out, TABLE), table)
    return Certificate(
        job="evaluate",
        config_hash=output_hash(config, plan.inputs),
        **count_fates(Counter(row["status"] for row in rows)),
        files=file_entries(config.out, [join(config.out, name) for name in (SCORES, TABLE)]),
        inputs=plan.inputs,
        facts={"remarks": remarks(values)},
    )
