"""Receipts of an evaluation's videos -> scores.json, videos.jsonl, and a few words about them.

A row is one video: side, name, text, status, error, sha256, id, the cache's keys of its features and of its
prompt's, and the sha256 of its prompt's reference pictures.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from model.evaluate.extract import Extractor, FeatureCache
from model.evaluate.metric import WARN_N, Features, Metric, Score, Video
from model.evaluate.networks import NetworkConfig
from model.evaluate.scores import Setting, digest, entry, few, folds_of, is_small, score

SIDES = ("sampled", "real")
GOOD = "ok"
NUM_NAMED = 10
"""Failed videos named at the end of the command; scores.json names all."""
Row = dict[str, Any]


def make_results(
    rows: Sequence[Row],
    metrics: Mapping[str, type[Metric]],
    obstacles: Mapping[str, str],
    *,
    cache: FeatureCache,
    networks: NetworkConfig,
    frames: Mapping[str, Any],
    system: Mapping[str, Any],
    allow_small_n: bool = False,
) -> tuple[dict[str, Any], bytes]:
    """(values of scores.json, bytes of videos.jsonl): their order and whoever made the features can't be seen.

    `obstacles` says of metrics that were asked for why they can't be computed, `frames` which the networks saw,
    `system` what made the sampled videos, as far as that is known.
    A score of few videos is left out unless `allow_small_n`: files that can't be read may leave too few.
    """
    scores, failures = score(metrics, features_of(rows, cache))
    for name in [] if allow_small_n else [n for n, found in scores.items() if is_small(metrics[n], found)]:
        found = scores.pop(name)
        failures[name] = few(found.n, found.n_real)
    names = sorted({name for metric in metrics.values() for name in metric.needs})
    identities = Extractor(networks, names, cache, {}, torch.device("cpu")).identities()
    setting = setting_of(rows, identities, frames, system)
    values = {
        "scores": {name: entry(metrics[name], found, setting) for name, found in scores.items()},
        "not_computed": {**obstacles, **failures},
        "failed": [
            {key: row[key] for key in ("side", "name", "status", "error")} for row in rows if not good(row)
        ],
        "counts": {side: dict(sorted(counts.items())) for side, counts in statuses(rows).items()},
        "repeated": repeated(rows),
    }
    return values, table_of(rows, scores)


def good(row: Row) -> bool:
    return row["status"] == GOOD


def of_side(rows: Sequence[Row], side: str) -> list[Row]:
    """The good videos of a side."""
    return [row for row in rows if row["side"] == side and good(row)]


def features_of(rows: Sequence[Row], cache: FeatureCache) -> Iterator[tuple[Video, Features]]:
    """The good videos with their features and their prompts', read one after the other."""
    for side in SIDES:
        found = of_side(rows, side)
        for row, fold in zip(found, folds_of([row["id"] for row in found]), strict=True):
            own = {name: cache.require(key) for name, key in row["features"].items()}
            prompt = {name: cache.require(key) for name, key in row["prompt"].items()}
            yield Video(row["name"], own, is_real=side == "real", fold=fold), prompt


def setting_of(
    rows: Sequence[Row],
    networks: Mapping[str, Mapping[str, Any]],
    frames: Mapping[str, Any],
    system: Mapping[str, Any],
) -> Setting:
    """What the scores depend on; hashes are over contents, not over names or places."""
    counts = statuses(rows)
    failed = {side: found.total() - found[GOOD] for side, found in counts.items()}
    texts = [row["text"] for row in rows if row["side"] == "sampled"]
    shown = [[str(row["text"]), *row.get("references", ())] for row in of_side(rows, "sampled")]
    return Setting(
        frames=frames,
        networks=networks,
        real=digest(sorted(row["id"] for row in of_side(rows, "real"))) if "real" in counts else None,
        prompts=digest(sorted(map(str, texts))) if any(texts) else None,
        references=digest(sorted(shown)),
        sampled=digest(sorted(row["id"] for row in of_side(rows, "sampled"))),
        system=system,
        failed=failed["sampled"],
        failed_real=failed.get("real", 0),
    )


def statuses(rows: Sequence[Row]) -> dict[str, Counter[str]]:
    """Videos of each side by status."""
    sides = dict.fromkeys(row["side"] for row in rows)
    return {side: Counter(row["status"] for row in rows if row["side"] == side) for side in sides}


def repeated(rows: Sequence[Row]) -> dict[str, int]:
    """How many videos of each side have the bytes of another: each counts."""
    found = {side: Counter(row["id"] for row in of_side(rows, side)) for side in SIDES}
    extra = {side: ids.total() - len(ids) for side, ids in found.items()}
    return {side: count for side, count in extra.items() if count}


def table_of(rows: Sequence[Row], scores: Mapping[str, Score]) -> bytes:
    """videos.jsonl: every video with its fate and its own values."""
    lines = []
    for row in rows:
        own = scores if row["side"] == "sampled" else {}
        each = {name: found.each[row["name"]] for name, found in own.items() if row["name"] in found.each}
        kept = {key: row.get(key) for key in ("side", "name", "text", "status", "error", "sha256")}
        # ASCII: a text may hold one of Unicode's line separators.
        lines.append(json.dumps({**kept, "scores": each}, sort_keys=True))
    return ("\n".join(lines) + "\n").encode()


def in_words(found: Mapping[str, Any]) -> str:
    """151.4 [148.2, 154.6] (n 256 and 256 real)."""
    low_high = found["interval"]
    interval = f" [{low_high[0]:.4g}, {low_high[1]:.4g}]" if low_high else ""
    real = f" and {found['n_real']:,} real" if found["n_real"] is not None else ""
    mark = ", small n" if found["small_n"] else ""
    return f"{found['value']:.5g}{interval} (n {found['n']:,}{real}{mark})"


def remarks(values: Mapping[str, Any]) -> list[str]:
    """The scores, and what stands beside them: failed videos by name, metrics that have none."""
    failed = values["failed"]
    lines = [f"{name} {in_words(found)}" for name, found in values["scores"].items()]
    lines += [f"{row['side']} {row['name']}: {row['status']} ({row['error']})" for row in failed[:NUM_NAMED]]
    if len(failed) > NUM_NAMED:
        lines.append(f"and {len(failed) - NUM_NAMED:,} more failed: scores.json names them all")
    lines += [f"not {name}: {why}" for name, why in values["not_computed"].items()]
    if any(found["below_advised_n"] for found in values["scores"].values()):
        lines.append(f"below {WARN_N:,} videos, compare only with scores of the same n")
    return lines
