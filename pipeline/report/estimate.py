"""`vimi-data plan`: what a memory of N documents costs on M nodes, from measured points and fitted laws.

Every number says where it comes from, and all of them are estimates. A law has three parts that can't be
negative, `cost = a + b N + c N^1.5`: what every run pays, what every document pays, and what it pays more the
more there are. The last is the vector index's alone, which took 38 times as long for 10 times the rows (the
stored profile, 10^5 to 10^6). It is fitted to runs of growing size by least squares of the relative error;
beyond the largest run it is an extrapolation, and is called one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
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
MEASURED = {
    "write_s": "write vectors",
    "vector_index_s": "vector indexes (IVF_RQ)",
    "tune_and_verify_s": "tune and verify the recall",
    "text_index_s": "BM25 index",
}
"""Columns of the profile's runs, and what the plan calls them."""
CROWDED = ("vector_index_s",)
"""Those that grow faster than the documents, as measured; the others read each document once."""


class PlanConfig(Config):
    """How large, and on what."""

    documents: int = Field(default=500_000_000, ge=1)
    """Documents of the memory. Default: the paper's 500M image-text pairs."""
    nodes: int = Field(default=1, ge=1, le=100_000)
    """Machines."""
    cpus_per_node: int = Field(default=64, ge=1, le=4096)
    """CPU cores of each."""
    gpus_per_node: int = Field(default=0, ge=0, le=64)
    """GPUs of each; 0 = embed on CPUs."""
    clip: str = "ViT-B-32"
    """The CLIP of the profile's embedding rates (stored: ViT-B-32, offline)."""
    profile: str | None = None
    """JSON of measurements, as `tests/bench/bench_embed.py --profile` writes one;
    None = the stored one."""


@dataclass(frozen=True)
class Law:
    """`cost = fixed + each N + crowd N^1.5`, and the runs that it was fitted to."""

    fixed: float
    each: float
    crowd: float
    smallest: int
    largest: int

    def __call__(self, count: float) -> float:
        return self.fixed + self.each * count + self.crowd * count**1.5

    def source(self, count: int) -> str:
        terms = {"": self.fixed, " N": self.each, " N^1.5": self.crowd}
        words = " + ".join(f"{value:.3g}{name}" for name, value in terms.items() if value)
        reach = f", extrapolated {count / self.largest:,.0f}x" if count > self.largest else ""
        return f"{words} s, fitted to {self.smallest:,} to {self.largest:,} rows{reach}"


@dataclass(frozen=True)
class Line:
    """One line of the plan."""

    what: str
    value: str
    source: str


def fit_law(points: Sequence[tuple[int, float]], *, crowded: bool = True) -> Law:
    """The law of least squared relative error; one point gives a cost for each document.

    Args:
        points: (rows, cost) of the runs.
        crowded: the law may have its N^1.5 part.

    Raises:
        ValueError: no usable point.
    """
    usable = [(n, cost) for n, cost in points if n > 0 and cost > 0]
    if not usable:
        raise ValueError("no measured point to fit a law to")
    rows, costs = (np.array(column, dtype=float) for column in zip(*usable, strict=True))
    terms = np.stack([np.ones_like(rows), rows, rows**1.5]) / costs
    best, least = np.array([0.0, costs[-1] / rows[-1], 0.0]), np.inf
    # Non-negative least squares: with so few terms, the best of all subsets that come out positive.
    parts, sizes = range(3 if crowded else 2), range(1, min(3, len(rows)) + 1)
    for used in (list(chosen) for size in sizes for chosen in combinations(parts, size)):
        scale = np.abs(terms[used]).max(axis=1, keepdims=True)
        found = np.linalg.lstsq((terms[used] / scale).T, np.ones_like(rows))[0] / scale[:, 0]
        # A further term must halve the error; one point can't tell a fixed cost from a growing one.
        error = float(np.square(found @ terms[used] - 1).sum()) * 2 ** len(used)
        if len(rows) > 1 and (found > 0).all() and error < least:
            least, best = error, np.zeros(3)
            best[used] = found
    return Law(*best.tolist(), smallest=int(rows.min()), largest=int(rows.max()))


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
    count, machine = config.documents, profile["machine"]
    lines, embed_s = _embedding(config, profile)
    laws = {
        name: fit_law([(r["rows"], r[name]) for r in profile["index"]], crowded=name in CROWDED)
        for name in MEASURED
    }
    scale = DIM / machine["dim"]
    # Measured with one column of vectors; the memory has three.
    factors = {name: 1.0 if name == "text_index_s" else COLUMNS * scale for name in MEASURED}
    seconds = {name: factors[name] * laws[name](count) for name in MEASURED}
    vectors_bytes, index_bytes = COLUMNS * 2 * DIM * count, COLUMNS * (DIM // 8 + 20) * count
    on_one = f"on one machine of {machine['cpus']} CPUs, as measured"
    columns = f"{COLUMNS} columns of {DIM}: {COLUMNS * scale:.2g}x of "
    lines += [
        Line(
            what,
            span(seconds[name]),
            f"{'' if name == 'text_index_s' else columns}{laws[name].source(count)}; {on_one}",
        )
        for name, what in MEASURED.items()
    ]
    lines += [
        Line(
            "pictures on disk",
            bytes_in_words(IMAGE_BYTES * count),
            f"{IMAGE_BYTES:,} bytes each (mean of such JPEGs)",
        ),
        Line("vectors on disk", bytes_in_words(vectors_bytes), f"{COLUMNS} x {DIM} x float16 (schema)"),
        Line(
            "index in memory",
            bytes_in_words(index_bytes),
            f"{COLUMNS} x (dim/8 + 20) bytes each (1-bit IVF_RQ)",
        ),
        Line(
            "wall time",
            span(embed_s + sum(seconds.values())),
            "sum of the above; no faults; a larger machine indexes faster",
        ),
    ]
    return lines


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
        points = [[r[name] for name in ("rows", *MEASURED)] for r in own.get("index", stored["index"])]
        _ = [rate["cpu_s_per_document"] for rate in own.get("embed", stored["embed"]).values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"profile {place} can't be used: {type(error).__name__} {error}",
            cure="make one with tests/bench/bench_embed.py --profile",
        ) from None
    return {**stored, **own} if points else stored
