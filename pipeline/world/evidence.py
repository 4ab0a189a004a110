"""Judges sampled videos of the world and says which claims hold: a table with errors, and one page.

Sets of samples (`vimi-train sample`) are read back by name; a sample's prompt leads to its clip, and the clip
to the concept that it should show. A claim is about one set, or about one against another on the same prompts
and seeds. Differences are paired, and prompts of one noun count once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field, model_validator

from infra.certificate import check_certified, read_certificate, require_certificate, write_sealed
from infra.config import Config, Location
from infra.errors import ConfigError, DataError
from infra.samples import SAMPLES, read_samples
from infra.storage import check_writable, exists, join, read_bytes, write_bytes
from infra.validation_cells import Cell, cells_of, rows_name
from pipeline.media.clip import target_frames
from pipeline.media.frames import clip_times, decode_frames, probe
from pipeline.report.album import Album
from pipeline.report.charts import Series, difference_chart
from pipeline.report.page import FOLDER as REPORT
from pipeline.report.read import EVIDENCE, Run, read_run
from pipeline.report.statistics import document_tables, last_validation
from pipeline.schema import Role
from pipeline.shards import ShardSet, open_part
from pipeline.world.concepts import CONCEPTS
from pipeline.world.judge import Difference, Seen, judge_video, paired

Measure = Literal["colour", "shape", "direction", "background", "pictures", "place"]
PLACE_SHARE = 0.1
"""A thing is on its way if it is seen within this share of the side, in the mean over the frames. Ours."""
ERRORS = 2.0
"""Standard errors that a difference must be away from zero to be one. Ours."""
PAGE_FILE = "evidence.html"
STRIP_PX = 96
LOOKS: tuple[Measure, ...] = ("colour", "shape", "direction")
"""What is told under a film strip."""
GUIDED: dict[Measure, str] = {"colour": "v0", "shape": "v1"}
"""What guidance towards the documents should raise -> the style of its curve."""
ROWS = 16
"""Rows of film strips on the page."""

Row = dict[str, Any]


class SampleSet(Config):
    """Videos of one model under one condition."""

    samples: Location
    """Folder of `vimi-train sample`."""
    prompts: Location
    """Folder of the prompt shards that they were made for."""
    title: str = ""
    """Over its film strips; empty = the set's name."""


class Claim(Config):
    """What should be so."""

    words: str = Field(min_length=1)
    """The claim in words."""
    measure: Measure
    """What is judged: colour (nearest of 8), shape, direction, background (nearest of 6), pictures (colour and
    background both), place (of the thing on its way, behind the first frame, which may have been given)."""
    of: str
    """Name of the set that it is about."""
    against: str | None = None
    """Name of another set of the same prompts and seeds."""
    task: str | None = None
    """Only prompts of this task; null = all."""
    at_least: float | None = Field(default=None, ge=0, le=1)
    """Least share of `of` that must be right."""
    at_most: float | None = Field(default=None, ge=0, le=1)
    """Greatest share of `of` that may be right."""
    difference: Literal["more", "none"] | None = None
    """more: `of` is right more often than `against`, by two standard errors; none: it is not, which is what a
    control must show."""

    @model_validator(mode="after")
    def _can_be_false(self) -> "Claim":
        if (self.difference is None) != (self.against is None):
            raise ValueError("give `against` and `difference` together, or neither")
        if self.at_least is None and self.at_most is None and self.difference is None:
            raise ValueError("a claim needs at_least, at_most or difference")
        return self


class LossClaim(Config):
    """What should be so of the loss of unseen rows, in a training's last validation."""

    words: str = Field(min_length=1)
    """The claim in words."""
    run: Location
    """One of `runs`."""
    against: Literal["none", "shuffled"]
    """Whose documents are given in place of the right ones."""
    quantile: float | None = None
    """Of the training's noise levels, one that its validation takes; null = the mean over those."""
    difference: Literal["more", "none"] = "more"
    """more: with these the loss is higher by two standard errors; none: it is not, as for a control."""


class EvidenceConfig(Config):
    """What is judged, and what should come out."""

    world: Location
    """Folder of `vimi-data world`."""
    sets: dict[str, SampleSet] = Field(min_length=1)
    """Sampled videos by a name of your own."""
    claims: tuple[Claim, ...]
    """In the order of the table."""
    losses: tuple[LossClaim, ...] = ()
    """Behind them."""
    out: Location
    """Folder of `evidence.json` and `evidence.html`."""
    strips: tuple[str, ...] = ()
    """Sets whose film strips stand beside the truth, of the same prompts; none = all sets."""
    runs: tuple[Location, ...] = ()
    """Trainings whose last validation is shown: loss by noise level with right, none and shuffled documents."""
    guidance: dict[float, str] = Field(default={})
    """Weight of the guidance towards the documents -> the set that was sampled with it: a curve on the page."""

    @model_validator(mode="after")
    def _sets_are_there(self) -> "EvidenceConfig":
        named = [*self.strips, *self.guidance.values()]
        named += [name for c in self.claims for name in (c.of, c.against) if name is not None]
        for name in named:
            if name not in self.sets:
                raise ValueError(f"set {name!r}; legal: {', '.join(self.sets)}")
        for claim in self.losses:
            if claim.run not in self.runs:
                raise ValueError(f"run {claim.run!r}; legal: {', '.join(self.runs) or 'none: give `runs`'}")
        return self


@dataclass(frozen=True)
class Judged:
    """One sampled video."""

    noun: str
    task: str
    key: tuple[str, str, int]
    """(clip, task, seed): pairs samples of two sets."""
    right: dict[str, bool]
    """Measure -> is it as it should be?"""
    frames: np.ndarray
    """uint8 `t h w 3` at the size that was sampled."""


class World:
    """What each clip of a world should show."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        with open_part(join(folder, "concepts.parquet")) as file:
            if not file.schema_arrow.equals(CONCEPTS):
                raise DataError(f"{folder}/concepts.parquet is of another version; cure: make the world again")
            self.rows = file.read().to_pylist()

    @cached_property
    def clips(self) -> dict[str, tuple[Row, Row]]:
        """Name of a video's file -> (its noun's row, its clip)."""
        return {clip["video"].rpartition("/")[2]: (row, clip) for row in self.rows for clip in row["clips"]}

    @cached_property
    def shapes(self) -> tuple[str, ...]:
        return tuple(sorted({row["shape"] for row in self.rows}))


def check(config: EvidenceConfig) -> None:
    """Refuse what can't be judged.

    Raises:
        ConfigError: no world, or a folder without samples.
    """
    require_certificate(config.world, job="world", made_by="vimi-data world")
    for found in config.sets.values():
        certificate = read_certificate(found.samples)
        if certificate is None or certificate.job != "sample" or not exists(join(found.samples, SAMPLES)):
            raise ConfigError(f"no samples in {found.samples}", cure="run `vimi-train sample` first")
    for place in config.runs:
        if not last_validation(read_run(place)):
            raise ConfigError(f"no validation in {place}", cure="give the run of a `vimi-train stage1`")
    for claim in config.losses:
        decide_loss(claim, last_validation(read_run(claim.run)))
    check_writable(config.out)


def run(config: EvidenceConfig) -> list[Row]:
    """Judge all sets, write `evidence.json` and the page.

    Returns:
        One row a claim: claim, measure, numbers with errors, n, holds.
    """
    check(config)
    world = World(config.world)
    prompts = {place: read_prompts(place) for place in {found.prompts for found in config.sets.values()}}
    judged = {name: judge_set(found, prompts[found.prompts], world) for name, found in config.sets.items()}
    runs = [read_run(place) for place in config.runs]
    cells = {run.name: cells_of(last_validation(run)) for run in runs}
    of_run = dict(zip(config.runs, runs, strict=True))
    rows = [decide(claim, judged) for claim in config.claims]
    rows += [decide_loss(claim, last_validation(of_run[claim.run])) for claim in config.losses]
    names = config.strips or tuple(config.sets)
    found = {
        "claims": rows,
        "sets": {name: summarise(samples) for name, samples in judged.items()},
        "losses": {name: {cell.name: value for cell, value in run.items()} for name, run in cells.items()},
        "titles": [config.sets[name].title or name for name in names],
        "strips": film_strips([judged[name] for name in names], prompts[config.sets[names[0]].prompts]),
    }
    write_sealed(join(config.out, EVIDENCE), found)
    write_bytes(join(config.out, PAGE_FILE), render(config, found, runs).encode())
    return rows


def read_prompts(folder: str) -> dict[str, Row]:
    """Prompt id -> its row."""
    shards = ShardSet(folder)
    columns = ["prompt_id", "clip_id", "task", "caption", "source_uri", "split", "segments", "target"]
    rows = (row for group in range(len(shards)) for row in shards.read_row_group(group, columns).to_pylist())
    return {row["prompt_id"]: row for row in rows if row["split"] != "train"}


def judge_set(found: SampleSet, prompts: dict[str, Row], world: World) -> list[Judged]:
    """Judge each video of a set.

    Raises:
        DataError: a sample whose prompt or clip is not of this world.
    """
    entries = read_samples(found.samples)
    return [judge_sample(found.samples, entry, prompts, world) for entry in entries]


def judge_sample(folder: str, entry: Row, prompts: dict[str, Row], world: World) -> Judged:
    """Judge one entry of samples.json."""
    row = prompts.get(entry["prompt_id"])
    name = str(row["source_uri"]).rpartition("/")[2] if row else ""
    if row is None or name not in world.clips:
        raise DataError(f"sample {entry['video']} of {folder} is of no held-out clip of {world.folder}")
    concept, clip = world.clips[name]
    frames = sampled_frames(join(folder, entry["video"]), row["target"])
    seen = judge_video(frames, size=clip["size"], shapes=world.shapes)
    return Judged(
        noun=concept["noun"],
        task=row["task"],
        key=(row["clip_id"], row["task"], entry["seed"]),
        right=compare(seen, concept, clip),
        frames=frames,
    )


def sampled_frames(place: str, target: Row) -> np.ndarray:
    """Frames of a sampled video at the size that it was made at: its file is enlarged to be looked at."""
    check_certified(place)
    data = read_bytes(place)
    info = probe(data)
    whole = decode_frames(data, clip_times(0, info.duration_s, info.num_frames))
    height, width = target["height_px"], target["width_px"]
    cells = whole.reshape(len(whole), height, info.height_px // height, width, info.width_px // width, 3)
    return np.rint(cells.mean(axis=(2, 4))).astype(np.uint8)


def compare(seen: Seen, concept: Row, clip: Row) -> dict[str, bool]:
    """Each measure: is what is seen what should be?"""
    way = np.linspace(clip["start"], clip["end"], len(seen.places))
    off = np.abs(seen.places - way).max(axis=1)
    colour, background = seen.colour == concept["colour"], seen.background == clip["background"]
    return {
        "colour": colour,
        "shape": seen.shape == concept["shape"],
        "direction": seen.direction == clip["motion"],
        "background": background,
        "pictures": colour and background,
        "place": bool((off[1:] if len(off) > 1 else off).mean() <= PLACE_SHARE),
    }


def share(samples: Sequence[Judged], measure: str) -> Difference:
    """Share of samples that are right, with the error of the mean over nouns."""
    values = [float(sample.right[measure]) for sample in samples]
    return paired(values, [0.0] * len(values), [sample.noun for sample in samples])


def summarise(samples: Sequence[Judged]) -> Row:
    """Shares of all measures in numbers."""
    found = {measure: share(samples, measure) for measure in samples[0].right}
    return {
        "videos": len(samples),
        "nouns": len({sample.noun for sample in samples}),
        **{name: {"share": value.mean, "error": value.error} for name, value in found.items()},
    }


def decide(claim: Claim, judged: dict[str, list[Judged]]) -> Row:
    """Whether a claim holds, and its numbers."""
    own = {s.key: s for s in judged[claim.of] if claim.task in (None, s.task)}
    other = {s.key: s for s in judged[claim.against] if claim.task in (None, s.task)} if claim.against else {}
    keys = sorted(own.keys() & other.keys() if claim.against else own.keys())
    if not keys:
        raise DataError(f"no videos for the claim {claim.words!r}; cure: sample more rows, of the same prompts")
    ours = share([own[key] for key in keys], claim.measure)
    row: Row = {
        "claim": claim.words,
        "measure": claim.measure,
        "of": claim.of,
        "against": claim.against,
        "share": ours.mean,
        "error": ours.error,
        "nouns": ours.count,
        "videos": len(keys),
    }
    holds = [claim.at_least is None or ours.mean >= claim.at_least]
    holds += [claim.at_most is None or ours.mean <= claim.at_most]
    if claim.against is not None:
        one, two = ([float(s[key].right[claim.measure]) for key in keys] for s in (own, other))
        difference = paired(one, two, [own[key].noun for key in keys])
        is_more = difference.mean > ERRORS * difference.error
        holds.append(is_more == (claim.difference == "more"))
        row |= {"difference": difference.mean, "difference_error": difference.error}
        row["other_share"] = ours.mean - difference.mean
    asked = {"at_least": claim.at_least, "at_most": claim.at_most, "difference": claim.difference}
    row |= {"asked": {k: v for k, v in asked.items() if v is not None}, "holds": all(holds)}
    return {**row, "numbers": numbers(row)}


def decide_loss(claim: LossClaim, validation: Row) -> Row:
    """Whether a claim about the loss holds, and its numbers."""
    right = Cell("video", "right", claim.quantile)
    gain = Cell("video", claim.against, claim.quantile, is_gain=True)
    error = replace(gain, is_error=True)
    if any(cell.name not in validation for cell in (right, gain, error)):
        legal = {f"{cell.quantile:g}" for cell in cells_of(validation) if cell.quantile is not None}
        raise ConfigError(
            f"the last validation of {claim.run} has no loss for {claim.words!r}",
            legal=f"a run with documents; quantile null or {', '.join(sorted(legal)) or 'none'}",
        )
    loss, more, sure = (validation[cell.name] for cell in (right, gain, error))
    level = "over all noise levels" if claim.quantile is None else f"at noise quantile {claim.quantile:g}"
    return {
        "claim": claim.words,
        "measure": "loss",
        "of": "right",
        "against": claim.against,
        "loss": loss,
        "difference": more,
        "difference_error": sure,
        "asked": {"difference": claim.difference},
        "holds": (more > ERRORS * sure) == (claim.difference == "more"),
        "numbers": f"loss {loss:.3f} {level}; {claim.against} {more:+.3f} ± {sure:.3f}; "
        f"{validation[rows_name('video')]} rows",
    }


def table(rows: Sequence[Row]) -> str:
    """The claims for a terminal, one a line."""
    words = {True: "holds", False: "FAILS"}
    return "\n".join(f"  {words[row['holds']]}  {row['claim']}: {row['numbers']}" for row in rows)


def numbers(row: Row) -> str:
    """A claim's numbers in words."""
    text = f"{row['measure']} right {row['share']:.2f} ± {row['error']:.2f}"
    if row["against"] is not None:
        text += f", against {row['other_share']:.2f} ({row['against']}): "
        text += f"{row['difference']:+.2f} ± {row['difference_error']:.2f}"
    asked = row["asked"]
    bounds = [f"{word} {asked[key]:.2f}" for key, word in (("at_least", "≥"), ("at_most", "≤")) if key in asked]
    text += f" (asked: {', '.join(bounds)})" if bounds else ""
    return f"{text}; {row['nouns']} nouns, {row['videos']} videos"


def render(config: EvidenceConfig, found: Row, runs: list[Run]) -> str:
    """The page: claims, losses, then film strips of the first set's prompts, a set a column."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, REPORT]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    curves = [guidance_curve(config.guidance, found["sets"], m) for m in GUIDED] if config.guidance else []
    return environment.get_template("evidence.html").render(
        style=Markup((REPORT / "style.css").read_text(encoding="utf-8")),
        evidence=found,
        losses=document_tables(runs),
        curve=difference_chart(curves, x_label="guidance weight", y_label="share right", title="Guidance"),
        legend=[(one.style, one.name) for one in curves],
    )


def guidance_curve(guidance: dict[float, str], sets: dict[str, Row], measure: Measure) -> Series:
    """Share of right videos over the weight of the guidance."""
    weights = sorted(guidance)
    found = [sets[guidance[weight]][measure] for weight in weights]
    return Series(measure, weights, [f["share"] for f in found], GUIDED[measure], [f["error"] for f in found])


def film_strips(sets: Sequence[list[Judged]], prompts: dict[str, Row]) -> list[Row]:
    """One row a noun: prompt, its picture, the true clip, and the same prompt's video of each set."""
    album = Album(max_bytes=10_000_000)
    by_key = {(row["clip_id"], row["task"]): row for row in prompts.values()}
    found = [{sample.key: sample for sample in samples} for samples in sets]
    first = {sample.noun: sample.key for sample in reversed(sets[0])}
    strips = []
    for key in list(reversed(first.values()))[:ROWS]:
        row = by_key[key[:2]]
        videos = [samples.get(key) for samples in found]  # a set of other prompts has none
        strips.append(
            {
                "caption": row["caption"],
                "picture": album.picture(_first_picture(row), side_px=STRIP_PX),
                "truth": _strip(target_frames(row["target"]), album),
                "videos": [
                    {"strip": _strip(v.frames, album), "right": [name for name in LOOKS if v.right[name]]}
                    if v
                    else {"strip": None, "right": []}
                    for v in videos
                ],
            }
        )
    return strips


def _first_picture(row: Row) -> bytes | None:
    pictures = (s["image"] for s in row["segments"] if s["type"] == "image" and s["role"] != Role.INSTRUCTION)
    return next(pictures, None)


def _strip(frames: np.ndarray, album: Album) -> str | None:
    """Film strip with square pixels, as they are."""
    factor = max(1, STRIP_PX // frames.shape[1])
    large = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    return album.filmstrip(large, height_px=large.shape[1])
