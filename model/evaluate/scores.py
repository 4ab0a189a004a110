"""Scores of a set of videos with the manifest that each depends on: what `scores.json` holds.

manifest   all that a number is a function of
protocol   the part of it that two numbers must share to be compared: all but whose videos they are
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

from threadpoolctl import threadpool_limits

from infra.certificate import VERSION
from infra.config import canonical_json
from infra.errors import ConfigError, DataError
from model.evaluate.metric import CONFIDENCE, FOLDS, SMALL_N, WARN_N, Features, Metric, Score, Video
from model.evaluate.metrics import METRICS
from model.evaluate.networks import NETWORKS, NetworkConfig, network_of

DEFAULT_METRICS = (
    *("fvd", "kvd", "is_i3d", "clip_t", "clip_i", "copy_guard"),
    *("consistency", "flicker", "dynamics", "frozen"),
)
BATCH = 256
"""Videos of one `update`: bounds what is in memory."""
NUM_SHOWN = 4
"""Best and worst videos that are named for each metric (ours)."""


@dataclass(frozen=True)
class Given:
    """What there is to score."""

    n: int
    n_real: int | None
    has_text: bool
    has_references: bool
    has_words: bool
    num_frames: int


def chosen(names: Sequence[str]) -> dict[str, type[Metric]]:
    """Metrics by name.

    Raises:
        ConfigError: no such metric; names those that there are.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ConfigError(f"no metric {', '.join(unknown)}", legal=", ".join(sorted(METRICS)))
    return {name: METRICS[name] for name in names}


def obstacles(metrics: Mapping[str, type[Metric]], given: Given, networks: NetworkConfig) -> dict[str, str]:
    """Why metrics can't be computed, a line each; those that can are not in it."""
    names = {network_of(need) for metric in metrics.values() for need in metric.needs}
    lacking = {name: why for name in sorted(names) if (why := _lacking(name, networks)) is not None}
    found = {name: _obstacle(metric, given, lacking) for name, metric in metrics.items()}
    return {name: why for name, why in found.items() if why is not None}


def _lacking(name: str, networks: NetworkConfig) -> str | None:
    """What a network lacks; a hub is asked once."""
    try:
        NETWORKS[name].find(networks)
    except ConfigError as error:
        return str(error)
    return None


def _obstacle(metric: type[Metric], given: Given, lacking: Mapping[str, str]) -> str | None:
    if metric.needs_real and given.n_real is None:
        return "needs real videos; cure: --against"
    if metric.needs_text and not given.has_text:
        return "needs prompts; cure: a prompts.jsonl beside the videos"
    if metric.needs_references and not given.has_references:
        return "needs prompts with reference pictures"
    for name in dict.fromkeys(map(network_of, metric.needs)):
        if NETWORKS[name].reads_words and not given.has_words:
            return "needs the words that the reference pictures stand for; cure: `words` in prompts.jsonl"
        least = NETWORKS[name].min_frames
        if given.num_frames < least:
            return f"{name} needs {least} frames; cure: --set frames.num_frames=16"
        if name in lacking:
            return lacking[name]
    return None


def too_few(metrics: Iterable[type[Metric]], given: Given) -> dict[str, str]:
    """Metrics whose value would say more of n than of the videos, with a line each: fewer than `SMALL_N`."""
    found = {}
    for metric in metrics:
        n_real = given.n_real if metric.needs_real else None
        if metric.is_biased and min(given.n, given.n if n_real is None else n_real) < SMALL_N:
            found[metric.name] = few(given.n, n_real)
    return found


def few(n: int, n_real: int | None) -> str:
    real = "" if n_real is None else f" and {n_real:,} real"
    return f"{n:,} sampled{real} videos, and its value depends on n; cure: more of them, or --allow-small-n"


def is_small(metric: type[Metric], score: Score, least: int = SMALL_N) -> bool:
    return metric.is_biased and min(score.n, score.n_real or score.n) < least


def refuse_small_n(metrics: Iterable[type[Metric]], given: Given) -> None:
    """Refuse scores that would say more of n than of the videos.

    Raises:
        ConfigError: fewer than `SMALL_N` on a side, for a metric whose value depends on n.
    """
    biased = too_few(metrics, given)
    if biased:
        sides = [given.n] if given.n_real is None else [given.n, given.n_real]
        counts = " and ".join(f"{n:,} {side}" for n, side in zip(sides, ("sampled", "real"), strict=False))
        raise ConfigError(
            f"{counts} videos for {', '.join(biased)}, whose value depends on n",
            legal=f"at least {SMALL_N} on each side ({WARN_N:,} are better)",
            cure="more videos, other --metrics, or --allow-small-n, which marks the scores",
        )


def score(
    metrics: Mapping[str, type[Metric]], videos: Iterable[tuple[Video, Features]]
) -> tuple[dict[str, Score], dict[str, str]]:
    """Scores by metric, and why the others have none; one thread, so that sums are the same anywhere."""
    made = {name: metric() for name, metric in metrics.items()}
    rest = iter(videos)
    scores, failures = {}, {}
    with threadpool_limits(1):
        while batch := list(islice(rest, BATCH)):
            for name in [name for name in made if name not in failures]:
                try:
                    made[name].update([video for video, _ in batch], [prompt for _, prompt in batch])
                except DataError as error:
                    failures[name] = f"can't be computed: {error}"
        for name in [name for name in made if name not in failures]:
            try:
                scores[name] = finite(made[name].compute())
            except DataError as error:
                failures[name] = f"can't be computed: {error}"
    return scores, failures


def finite(score: Score) -> Score:
    """The score.

    Raises:
        DataError: its value is no number, since a feature of some video is none.
    """
    if not math.isfinite(score.value):
        raise DataError(f"its value is {score.value}; expected finite features")
    return score


def folds_of(ids: Sequence[str]) -> list[int]:
    """The fold of each video: by its place in the order of the ids, so that folds differ by one at most."""
    ranks = {place: rank for rank, place in enumerate(sorted(range(len(ids)), key=lambda n: (ids[n], n)))}
    return [ranks[place] % FOLDS for place in range(len(ids))]


def digest(values: Any) -> str:
    """16 hex digits of plain values."""
    return sha256(canonical_json(values)).hexdigest()[:16]


@dataclass(frozen=True)
class Setting:
    """What all scores of an evaluation depend on.

    Attributes:
        frames: which frames are seen.
        networks: name -> identity.
        real: hash of the real videos that were read; None without such.
        prompts: hash of the prompts' words, None without such.
        references: hash of the same with the reference pictures' contents.
        sampled: hash of the sampled videos that were read.
        system: what made them, as far as that is known.
        failed, failed_real: how many videos of each side could not be read.
    """

    frames: Mapping[str, Any]
    networks: Mapping[str, Mapping[str, Any]]
    real: str | None
    prompts: str | None
    references: str
    sampled: str
    system: Mapping[str, Any]
    failed: int
    failed_real: int

    def protocol(self, metric: type[Metric], score: Score) -> dict[str, Any]:
        """What two values of a metric must share to be compared."""
        networks = {network_of(name): self.networks[network_of(name)] for name in metric.needs}
        return {
            "metric": metric.name,
            "version": VERSION,
            "frames": dict(self.frames),
            "networks": networks,
            "n": score.n,
            "n_real": score.n_real,
            "real": self.real if metric.needs_real else None,
            "prompts": self.prompts,
            **({"references": self.references} if metric.needs_references else {}),
        }


def entry(metric: type[Metric], score: Score, setting: Setting) -> dict[str, Any]:
    """One score of `scores.json`."""
    protocol = setting.protocol(metric, score)
    manifest = {**protocol, "sampled": setting.sampled, "system": dict(setting.system)}
    ranked = sorted(score.each, key=lambda name: (score.each[name], name), reverse=metric.better != "lower")
    return {
        "value": score.value,
        "interval": score.interval and [*score.interval],
        "confidence": CONFIDENCE,
        "better": metric.better,
        "n": score.n,
        "n_real": score.n_real,
        "failed": setting.failed,
        "failed_real": setting.failed_real if metric.needs_real else None,
        "small_n": is_small(metric, score),
        "below_advised_n": is_small(metric, score, WARN_N),
        "best": ranked[:NUM_SHOWN],
        "worst": ranked[::-1][:NUM_SHOWN],
        "protocol": digest(protocol),
        "manifest": manifest,
    }
