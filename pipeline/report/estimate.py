"""`vimi-data plan`: what a corpus, its memory of N documents and their join cost, from measured points.

Every number says where it comes from, and all of them are estimates. A law has two parts that can't be
negative, `cost = a + b N`: what every run pays, and what every document pays, which workers meet once, or with
at most `MAX_COMPARED` others. It is fitted to runs of growing size by least squares of the relative error;
beyond the largest run it is an extrapolation, and is called one. Workers' seconds are of one core.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from infra.config import Config
from infra.errors import ConfigError
from infra.progress import bytes_in_words, span

STORED = Path(__file__).with_name("estimate_profile.json")
COLUMNS, DIM = 3, 512  # image, text and document vectors; their width at ViT-B-32
GPU_DOCUMENTS_PER_S = 1500.0
"""Documents a second and GPU: clip-retrieval's published rate for ViT-B/32 on an RTX 3080."""
IMAGE_BYTES = 25_000
"""Mean size of a document's JPEG (384 px at quality 90: 15 to 40 kB). Ours."""
SHARED = {
    "keys_s": "keys of duplicates",
    "duplicates_s": "duplicates",
    "shards_s": "write shards, without pictures",
    "index_s": "index for search",
}
"""Columns of the profile's runs that workers share out, and what the plan calls them."""
DRIVER_S, DRIVER_BYTES = "driver_s", "driver_bytes"
"""Columns of what the driver does alone: the commit, BM25's statistics, the sample."""
STAGES = ("crawl", "build-index", "augment", "encode", "read")
"""Jobs of the profile's `stages`, whose requests are counted; read = row groups by the trainer."""
TFLOPS = 100e12
"""Operations a second of one GPU in the join by vectors: a third of an A100's dense bf16. Ours."""
ROW_GROUP_ROWS = 32
"""Prompts of a row group, as `augment` writes them by default."""
LANES = 48
"""Places of an epoch that the trainer walks side by side; ranks that divide it share no row group."""
SLOW_DAYS = 30.0
"""A job that takes longer is called out. Ours."""


class PlanConfig(Config):
    """How large, and on what."""

    documents: int = Field(default=500_000_000, ge=1)
    """Documents of the memory. Default: the paper's 500M image-text pairs."""
    captions: int = Field(default=10_000_000, ge=0)
    """Captions that augment joins with it. 10M is ours: the paper names no number."""
    nodes: int = Field(default=1, ge=1, le=100_000)
    """Machines."""
    cpus_per_node: int = Field(default=64, ge=1, le=4096)
    """CPU cores of each."""
    gpus_per_node: int = Field(default=0, ge=0, le=64)
    """GPUs of each; 0 = embed, and join by vectors, on CPUs."""
    ram_gb_per_node: int = Field(default=256, ge=1, le=100_000)
    """Memory of each, GB."""
    clip: str = "ViT-B-32"
    """The CLIP of the profile's embedding rates (stored: ViT-B-32, offline)."""
    profile: str | None = None
    """JSON of measurements, as `bench_scale.py --profile` and `bench_embed.py --profile` of `tests/bench` write
    them; None = the stored one."""


@dataclass(frozen=True)
class Law:
    """`cost = fixed + each N`, and the runs that it was fitted to."""

    fixed: float
    each: float
    smallest: int
    largest: int

    def __call__(self, count: float) -> float:
        return self.fixed + self.each * count

    def source(self, count: int, unit: str = "s") -> str:
        words = " + ".join(f"{v:.3g}{name}" for name, v in (("", self.fixed), (" N", self.each)) if v)
        reach = f", extrapolated {count / self.largest:,.0f}x" if count > self.largest else ""
        return f"{words} {unit}, fitted to {self.smallest:,} to {self.largest:,} rows{reach}"


@dataclass(frozen=True)
class Line:
    """One line of the plan."""

    what: str
    value: str
    source: str


def fit_law(points: Sequence[tuple[int, float]]) -> Law:
    """The law of least squared relative error without a negative part; one point gives a cost for each row.

    `points` are (rows, cost) of the runs.

    Raises:
        ValueError: no usable point.
    """
    usable = [(n, cost) for n, cost in points if n > 0 and cost > 0]
    if not usable:
        raise ValueError("no measured point to fit a law to")
    rows, costs = (np.array(column, dtype=float) for column in zip(*usable, strict=True))
    parts = np.stack([np.ones_like(rows), rows], axis=1) / costs[:, None]
    if len(rows) == 1:
        parts = parts[:, 1:]
    found = np.linalg.lstsq(parts, np.ones_like(rows))[0]
    if (found < 0).any():  # the best law of one part
        each = [float(part.sum() / np.square(part).sum()) for part in parts.T]
        errors = [float(np.square(x * part - 1).sum()) for x, part in zip(each, parts.T, strict=True)]
        found = np.where(np.arange(2) == np.argmin(errors), each, 0.0)
    fixed, each = (0.0, *found.tolist())[-2:]
    return Law(fixed, each, smallest=int(rows.min()), largest=int(rows.max()))


def check(config: PlanConfig) -> str:
    """The plan's first words; refuses an unreadable profile."""
    load_profile(config.profile)
    return f"{config.documents:,} documents on {config.nodes:,} nodes"


def run(config: PlanConfig) -> list[Line]:
    """Print the plan and return its lines."""
    lines = plan(config)
    wide, narrow = max(len(line.what) for line in lines), max(len(line.value) for line in lines)
    print(f"ESTIMATE: a memory of {config.documents:,} documents on {config.nodes:,} nodes")
    for line in lines:
        print(f"  {line.what:<{wide}}  {line.value:>{narrow}}  {line.source}")
    return lines


def plan(config: PlanConfig) -> list[Line]:
    """Work, room and time, each with its source."""
    profile = load_profile(config.profile)
    embedding, embed_s = _embedding(config, profile)
    build, build_s = _build(config, profile["scale"])
    total = Line("build, wall", span(embed_s + build_s), "sum of the above; no faults")
    scale, stages = profile["scale"], profile["stages"]
    parts = [
        *_clips(config, stages),
        *embedding,
        *build,
        total,
        *_join(config, scale),
        *_prompts(config, stages),
        *_room(config, scale),
        *_requests(config, stages),
    ]
    stage1 = Line(
        "stage 1, time and memory", "see describe", "`vimi-train describe` counts a network's operations"
    )
    return [*parts, stage1, *_breaks(config, profile, build_s + embed_s)]


def _clips(config: PlanConfig, stages: dict[str, Any]) -> list[Line]:
    return [_job(config, stages, "crawl", config.captions)]


def _prompts(config: PlanConfig, stages: dict[str, Any]) -> list[Line]:
    """What every caption takes beside the join, and its encoding."""
    return [_job(config, stages, job, config.captions) for job in ("augment", "encode")]


def _job(config: PlanConfig, stages: dict[str, Any], job: str, count: int) -> Line:
    """Wall time of a job whose rows don't meet each other."""
    law, cpus = (
        fit_law([(run["rows"], run["cpu_s"]) for run in stages[job]]),
        config.nodes * config.cpus_per_node,
    )
    what = f"{job}, beside the join, wall" if job == "augment" else f"{job}, wall"
    return Line(
        what, span(law(count) / cpus), f"{law.source(count)} of a core ({stages['what']}); on {cpus:,} CPUs"
    )


def _requests(config: PlanConfig, stages: dict[str, Any]) -> list[Line]:
    """What an object store is asked by each job, and by every rank in an epoch of stage 1."""
    groups = -(-config.captions // ROW_GROUP_ROWS)
    counts = dict.fromkeys(STAGES, config.captions) | {"build-index": config.documents, "read": groups}
    lines = []
    for job in STAGES:
        law, count = fit_law([(run["rows"], run["requests"]) for run in stages[job]]), counts[job]
        shared = shared_reads(config) if job == "read" else 1
        what = f"requests of {'an epoch of stage 1' if job == 'read' else job}"
        source = law.source(count, unit="requests")
        source += f"; {groups:,} row groups, each read by {shared} ranks" if job == "read" else ""
        lines.append(Line(what, f"{law(count) * shared:,.0f}", source))
    return lines


def shared_reads(config: PlanConfig) -> int:
    """Ranks that read each row group: 1 where the number of ranks divides the lanes."""
    ranks = config.nodes * max(1, config.gpus_per_node)
    return ranks // math.gcd(ranks, LANES)


def _breaks(config: PlanConfig, profile: dict[str, Any], build_s: float) -> list[Line]:
    """What would not work, or not well; one line that says so where nothing is known."""
    worker = max(run["worker_bytes"] for run in profile["scale"]["runs"])
    driver = fit_law(_points(profile["scale"], DRIVER_BYTES))(config.documents)
    ram, fit = config.ram_gb_per_node * 1e9, int(config.ram_gb_per_node * 1e9 // worker)
    found = []
    if fit < config.cpus_per_node:
        cure = f"a worker a core; cure: num_workers up to {fit * config.nodes:,}, or more memory"
        found.append(Line("BREAKS: memory of the workers", bytes_in_words(worker * config.cpus_per_node), cure))
    if driver > ram:
        found.append(Line("BREAKS: memory of the driver", bytes_in_words(int(driver)), "a larger head node"))
    if build_s > SLOW_DAYS * 86400:
        found.append(
            Line("BREAKS: patience", span(build_s), "embedding on CPUs; cure: gpus_per_node, or more nodes")
        )
    for name, seconds in join_seconds(config, profile["scale"]).items():
        on_gpus = name != "bm25" and config.gpus_per_node > 0
        if seconds > SLOW_DAYS * 86400 and not on_gpus:
            cure = "on CPUs; cure: more nodes, fewer captions" + (
                "" if name == "bm25" else ", or gpus_per_node"
            )
            found.append(Line(f"BREAKS: patience, join {name}", span(seconds), cure))
    if shared_reads(config) > 1:
        cure = f"ranks that don't divide {LANES} share row groups; cure: {nearest_ranks(config)} ranks"
        found.append(Line("SLOW: reads of stage 1", f"{shared_reads(config)} times", cure))
    looked_at = "memory of workers and driver, time of build and join, shared reads"
    return found or [Line("breaks", "nothing known", looked_at)]


def nearest_ranks(config: PlanConfig) -> int:
    """The largest number of ranks below the config's that divides the lanes."""
    ranks = config.nodes * max(1, config.gpus_per_node)
    return max(n for n in range(1, LANES + 1) if LANES % n == 0 and n <= ranks)


def _build(config: PlanConfig, scale: dict[str, Any]) -> tuple[list[Line], float]:
    """Lines of the memory's parts after embedding, and their seconds one after the other."""
    count, cpus = config.documents, config.nodes * config.cpus_per_node
    lines, total_s = [], 0.0
    for name, what in SHARED.items():
        law = fit_law(_points(scale, name))
        seconds = law(count) / cpus
        lines.append(
            Line(what, span(seconds), f"{law.source(count)} of a core; on {cpus:,} CPUs{_width(scale)}")
        )
        total_s += seconds
    law = fit_law(_points(scale, DRIVER_S))
    words = f"{law.source(count)}; the driver alone"
    return [*lines, Line("commit", span(law(count)), words)], total_s + law(count)


def _join(config: PlanConfig, scale: dict[str, Any]) -> list[Line]:
    """A line a retriever: every caption meets every shard, by vectors on GPUs where there are some."""
    cpus, largest = config.nodes * config.cpus_per_node, _largest(scale)
    met = largest["rows"] * scale["captions"]
    reach = config.documents * config.captions / met
    lines = []
    for name, seconds in join_seconds(config, scale).items():
        words = f"{largest['join_s'][name] / met * 1e9:.3g} ns of a core a caption and document"
        words += f", measured at {largest['rows']:,} x {scale['captions']:,}; linear in both"
        words += f", extrapolated {reach:,.0f}x" if reach > 1 else ""
        lines.append(Line(f"join {name}, wall", span(seconds), f"{words}; on {cpus:,} CPUs{_width(scale)}"))
    return [*lines, *_gpu_join(config)]


def join_seconds(config: PlanConfig, scale: dict[str, Any]) -> dict[str, float]:
    """Wall time of the join on CPUs by each retriever."""
    largest, cpus = _largest(scale), config.nodes * config.cpus_per_node
    met = largest["rows"] * scale["captions"]
    share = config.documents * config.captions / met / cpus
    return {name: seconds * share for name, seconds in largest["join_s"].items()}


def _largest(scale: dict[str, Any]) -> dict[str, Any]:
    """The largest run of a profile."""
    return max(scale["runs"], key=lambda run: run["rows"])


def _gpu_join(config: PlanConfig) -> list[Line]:
    """An exact join by vectors is 2 Q N d operations."""
    gpus = config.nodes * config.gpus_per_node
    if not gpus:
        return []
    seconds = 2 * config.captions * config.documents * DIM / TFLOPS / gpus
    source = f"2 Q N {DIM} operations at {TFLOPS / 1e12:.0f} TFLOP/s on {gpus:,} GPUs; arithmetic, not measured"
    return [Line("join clip on GPUs, wall", span(seconds), source)]


def _room(config: PlanConfig, scale: dict[str, Any]) -> list[Line]:
    """Disk and memory."""
    count, largest = config.documents, _largest(scale)
    law = fit_law(_points(scale, DRIVER_BYTES))
    worker = f"largest measured, shards of {scale['shard_rows']:,}; does not grow with the memory"
    picture = f"{IMAGE_BYTES:,} bytes each (mean of such JPEGs)"
    return [
        Line("pictures on disk", bytes_in_words(IMAGE_BYTES * count), picture),
        Line(
            "vectors on disk",
            bytes_in_words(COLUMNS * 2 * DIM * count),
            f"{COLUMNS} x {DIM} x float16 (schema)",
        ),
        Line("memory of a worker", bytes_in_words(largest["worker_bytes"]), worker),
        Line(
            "memory of the driver",
            bytes_in_words(int(law(count))),
            f"commit and statistics: {law.source(count, unit='bytes')}",
        ),
    ]


def _points(scale: dict[str, Any], name: str) -> list[tuple[int, float]]:
    return [(run["rows"], run[name]) for run in scale["runs"]]


def _width(scale: dict[str, Any]) -> str:
    """That vectors were measured at another width, where that is so."""
    return "" if scale["dim"] == DIM else f"; vectors of {scale['dim']} in place of {DIM}"


def _embedding(config: PlanConfig, profile: dict[str, Any]) -> tuple[list[Line], float]:
    if config.gpus_per_node:
        gpus = config.nodes * config.gpus_per_node
        gpu_s = config.documents / GPU_DOCUMENTS_PER_S
        source = f"{GPU_DOCUMENTS_PER_S:,.0f} documents/s and GPU (published, not measured)"
        work = Line("embed, GPU hours", f"{gpu_s / 3600:,.0f}", source)
        return [work, Line("embed, wall", span(gpu_s / gpus), f"on {gpus:,} GPUs, evenly spread")], gpu_s / gpus
    rates, machine = profile["embed"], profile["machine"]
    if config.clip not in rates:
        known = ", ".join(sorted(rates))
        raise ConfigError(f"the profile has no embedding rate of {config.clip!r}", legal=known)
    rate = rates[config.clip]
    cpu_s = rate["cpu_s_per_document"] * config.documents
    cpus = config.nodes * config.cpus_per_node
    source = f"{rate['cpu_s_per_document']:.3g} CPU s each: {rate['what']}; {machine['cpus']} CPUs"
    work = Line(
        "embed, CPU hours", f"{cpu_s / 3600:,.0f}", f"{source} ({machine['processor']}), measured; linear"
    )
    return [work, Line("embed, wall", span(cpu_s / cpus), f"on {cpus:,} CPUs, evenly spread")], cpu_s / cpus


def load_profile(place: str | None) -> dict[str, Any]:
    """A profile's measurements; parts that it lacks come from the stored one.

    Raises:
        ConfigError: unreadable, or not a profile.
    """
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    if place is None:
        return stored
    try:
        own = json.loads(Path(place).read_text(encoding="utf-8"))
        scale = own.get("scale", stored["scale"])
        names = ("rows", *SHARED, DRIVER_S, DRIVER_BYTES, "join_s", "worker_bytes")
        points = [[run[name] for name in names] for run in scale["runs"]]
        _ = [scale[name] for name in ("dim", "captions", "shard_rows", "cpus")]
        _ = [rate["cpu_s_per_document"] for rate in own.get("embed", stored["embed"]).values()]
        stages = own.get("stages", stored["stages"])
        _ = [run[name] for job in STAGES for run in stages[job] for name in ("rows", "cpu_s", "requests")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"profile {place} can't be used: {type(error).__name__} {error}",
            cure="make one with tests/bench/bench_scale.py --profile",
        ) from None
    return {**stored, **own} if points else stored
