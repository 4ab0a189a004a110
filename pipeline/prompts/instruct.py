"""`vimi-data instruct`: prompts of stage 1 -> instructions of stage 2, one schema, exactly once.

    certified prompts --row groups--> workers: frames, masks, segments --> one shard a unit --> certificate
            crops (`vimi-data subjects`), if given --^   pictures of words, from this clip or from another place

A *draw* is a clip and a task. Every draw ends as an instruction or leaves with a status and a reason:
a caption without a subject can't be subject-driven, a picture has no first frame to go on from, a row
without documents can't be retrieval-augmented.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator

from infra.certificate import Certificate, FileEntry, require_certificate
from infra.clip import OFFLINE
from infra.config import Incidental, Location
from infra.errors import ConfigError
from infra.storage import join
from pipeline.job import NetworkJobConfig, count_fates, output_hash, refuse_failures, run_job, run_networks
from pipeline.journal import Receipt, Receipts, Unit
from pipeline.prompts.inputs import check_prompts, plan_units
from pipeline.prompts.subjects.crops import JOB as CROPS_JOB
from pipeline.prompts.subjects.crops import Place, crops_key, find_places, read_crops
from pipeline.prompts.subjects.finder import SubjectConfig, SubjectFinder, check_subjects, networks
from pipeline.prompts.subjects.pairs import BINS, Pairs, Tally, draw_histogram
from pipeline.prompts.tasks import RECIPES, Choice, Draw, Recipe, Row, draw_tasks, text
from pipeline.schema import PAIRS, PROMPTS, Role, RowError, Status, Task, prompt_id
from pipeline.shards import (
    PAIRS_FILE,
    PLACES_FILE,
    ShardSet,
    rejected_row,
    shard_name,
    write_meta,
    write_rejected,
    write_shard,
)

JOB = "instruct"


class InstructConfig(NetworkJobConfig):
    """Prompts of stage 1 -> instructions of stage 2."""

    prompts: Incidental[Location]
    """Output folder of `vimi-data augment`: captions, retrieved documents, targets."""
    clips: Incidental[Location | None] = None
    """Output folder of `vimi-data crawl`; needed only where the sources were fetched from URLs, to find
    the fetched bytes."""
    tasks: tuple[str, ...] = tuple(str(task) for task in RECIPES)
    """Tasks to make, by default the paper's three."""
    proportions: dict[str, float] | None = None
    """None = every clip serves every task that it can; else each clip serves one task, drawn by these
    weights, and a task that is not named weighs 1. VIMI's are not published; Kosmos-G mixes 2:2:1."""
    subjects: SubjectConfig = SubjectConfig()
    """How words become pictures; with `crops` only `max_subjects` and `background_prob` count."""
    crops: Incidental[Location | None] = None
    """Output folder of `vimi-data subjects`, made of the same prompts. None = cut-outs are made here, of the
    clip itself."""
    pairs: Pairs = "in_pair"
    """Where a word's picture comes from. in_pair: the clip itself (Video Alchemist); cross_clip: another clip
    of the same source video, for things that don't live also the retrieved documents, and words without one
    stay words; mixed: cross_clip where there is one, else in_pair. All but in_pair need `crops`."""
    similarity: tuple[float, float] = (0.9, 0.97)
    """Least and greatest CLIP cosine of the cut-outs of a cross-pair. Phantom-Data has both bounds and prints
    neither. Ours, of the offline CLIP on labelled cut-outs, few and right: of 377 pairs of two people whom the
    same word names in two videos 9 % lie inside (76 % would from .60 on), of 45 pairs of one thing at two
    moments of a clip 22 %, and 29 % above are all but the same picture. For crops with another CLIP's vectors
    set both bounds by the histogram that is printed."""
    references: int = Field(default=3, ge=1, le=16)
    """Most pictures of one subject; how many is drawn uniformly from 1 to what there is (Video Alchemist: 1-3,
    and their number random, or the model ties motion to it). More than one needs `crops`."""
    unit_rows: int = Field(default=64, ge=1, le=65536)
    """About how many prompts make one unit of work and one output shard: what a kill loses at most, for
    each worker. Ours: about 30 MB with all three tasks; give 1,024 for corpora of many millions."""
    row_group_rows: int = Field(default=64, ge=1, le=65536)
    """Rows of an output row group: the trainer's unit of reading."""
    seed: int = 0
    """Of all draws; each is a function of (seed, clip id)."""
    max_failed_frac: Incidental[float] = Field(default=0.5, ge=0, le=1)
    """Greatest share of draws that may die (unreadable sources) before the job fails."""

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not set(value) <= set(RECIPES) or len(set(value)) < len(value):
            raise ValueError(f"give each task once; legal: {', '.join(RECIPES)}")
        return value

    @field_validator("similarity")
    @classmethod
    def _bounds_in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not -1 <= value[0] <= value[1] <= 1:
            raise ValueError("the least and the greatest cosine of a pair; legal: -1 <= least <= greatest <= 1")
        return value

    @field_validator("proportions")
    @classmethod
    def _legal_weights(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if not set(value or ()) <= set(RECIPES):
            raise ValueError(f"weights of tasks; legal: {', '.join(RECIPES)}")
        if any(not 0 <= weight < float("inf") for weight in (value or {}).values()):
            raise ValueError("weights are finite and not negative")
        return value


def check(config: InstructConfig) -> ShardSet:
    """Refuse what can't work before Ray starts.

    Raises:
        ConfigError: no certified prompts or clips, unknown networks, weights all zero.
    """
    shards = check_prompts(config.prompts, config.clips)
    if Task.SUBJECT_DRIVEN in config.tasks:
        _check_crops(config, shards)
    if config.proportions and not sum(config.proportions.get(task, 1.0) for task in config.tasks):
        raise ConfigError("proportions leave no task", legal="at least one weight above 0")
    return shards


def _check_crops(config: InstructConfig, shards: ShardSet) -> None:
    if config.crops is None:
        if config.pairs != "in_pair":
            raise ConfigError(
                f"pairs={config.pairs} takes references from elsewhere, which the table of crops holds",
                legal="crops, or pairs=in_pair",
                cure=f"vimi-data subjects {config.prompts} --out crops, then --crops crops",
            )
        check_subjects(config.subjects)
        return
    certificate = require_certificate(config.crops, job=CROPS_JOB, made_by="vimi-data subjects")
    if certificate.inputs.get("prompts") != shards.certificate.content_hash():
        raise ConfigError(
            f"{config.crops} was made of other prompts than {config.prompts}",
            legal="crops of these prompts",
            cure=f"vimi-data subjects {config.prompts} --out crops",
        )
    if PLACES_FILE not in {entry.path for entry in certificate.files}:
        raise ConfigError(
            f"{config.crops} was made by an earlier version",
            cure=f"vimi-data subjects {config.prompts} --out crops",
        )
    if config.pairs != "in_pair" and certificate.facts.get("clip") is None:
        raise ConfigError(
            f"{config.crops} holds no CLIP vectors, by which pairs={config.pairs} compares cut-outs",
            legal="crops made with a CLIP, or pairs=in_pair",
            cure=f"vimi-data subjects {config.prompts} --out crops --clip offline",
        )


def run(config: InstructConfig) -> Certificate:
    """Make the instructions; the same command starts and resumes.

    Raises:
        ConfigError: see `check`.
        TooManyFailuresError: more draws died than `max_failed_frac` allows.
    """
    shards = check(config)
    inputs = input_hashes(config, shards)
    units = list(_with_crops(config, shards, plan_units(shards, config.clips, config.unit_rows)))
    recipes = {task: RECIPES[task] for task in config.tasks}
    worker = partial(InstructWorker, config, output_hash(config, inputs), recipes)
    work = partial(run_networks, config, units, worker, what=JOB)
    finish = partial(_finish, config, inputs, units)
    return run_job(JOB, config, inputs, work=work, finish=finish)


def _with_crops(config: InstructConfig, shards: ShardSet, units: Iterable[Unit]) -> Iterator[Unit]:
    """Each unit with the places of the crops that it needs, so that no worker looks through the table."""
    if config.crops is None or Task.SUBJECT_DRIVEN not in config.tasks:
        yield from units
        return
    by = _crops_by(config)
    places = find_places(config.crops, by)
    for unit in units:
        found: set[Place] = set()
        for group in unit.payload["row_groups"]:
            for row in shards.read_row_group(group, ["clip_id", "source_uri", "source_sha256"]).to_pylist():
                found.update(places.get(crops_key(row, by), ()))
        yield Unit(unit.id, {**unit.payload, "crops": sorted(found)})


def _crops_by(config: InstructConfig) -> Literal["clip_id", "clip_source"]:
    """By which column a clip's crops are found: only cross-pairs need those of its whole source video."""
    return "clip_id" if config.pairs == "in_pair" else "clip_source"


def input_hashes(config: InstructConfig, shards: ShardSet) -> dict[str, str]:
    """What the output is made of, besides the config."""
    hashes = {"prompts": shards.certificate.content_hash()}
    if Task.SUBJECT_DRIVEN in config.tasks:
        if config.crops:
            crops = require_certificate(config.crops, job=CROPS_JOB, made_by="vimi-data subjects")
            hashes["crops"] = crops.content_hash()
        else:
            hashes |= networks(config.subjects)
    return hashes


class InstructWorker:
    """Turns a run of row groups into one shard of instructions and a receipt."""

    def __init__(self, config: InstructConfig, config_hash: str, recipes: Mapping[str, Recipe]) -> None:
        self.config, self.config_hash, self.recipes = config, config_hash, recipes
        self.shards = ShardSet(config.prompts)
        self.finder = SubjectFinder(config.subjects, "cuda" if config.num_gpus else "cpu")
        self.tally = Tally()
        self.crops: dict[str, list[Row]] = {}

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        made: list[Row] = []
        rejected: list[Row] = []
        self.tally, rows = Tally(), []
        for group in payload["row_groups"]:
            rows += self.shards.read_row_group(group).to_pylist()
        if self.config.crops and "crops" in payload:
            by = _crops_by(self.config)
            wanted = {crops_key(row, by) for row in rows}
            self.crops = read_crops(self.config.crops, payload["crops"], wanted, by=by)
        for row in rows:
            for task in self.tasks_of(row["clip_id"]):
                result = self.instruct(row, task, payload["local"].get(row["clip_id"]))
                (made if "prompt_id" in result else rejected).append(result)
        entry = None
        if made:
            place = join(self.config.out, shard_name(payload["number"]))
            entry = write_shard(place, made, PROMPTS, row_group_rows=self.config.row_group_rows).model_dump()
        notes = dict(Counter(row["status"] for row in rejected))
        compared = self.tally.receipt()
        counts = _count(made)
        return {"entry": entry, "rejected": rejected, "counts": counts, "compared": compared, "notes": notes}

    def draw(self, row: Row, local_uri: str | None) -> Draw:
        return Draw(row, local_uri, self.finder, self.config.seed, self.choice(row))

    def choice(self, row: Row) -> Choice | None:
        config = self.config
        if config.crops is None:
            return None
        return Choice(
            self.crops.get(crops_key(row, _crops_by(config)), []),
            max_subjects=config.subjects.max_subjects,
            background_prob=config.subjects.background_prob,
            pairs=config.pairs,
            similarity=config.similarity,
            references=config.references,
            tally=self.tally,
        )

    def tasks_of(self, clip_id: str) -> list[str]:
        config = self.config
        return draw_tasks(config.tasks, config.proportions, seed=config.seed, clip_id=clip_id)

    def instruct(self, row: Row, task: str, local_uri: str | None) -> Row:
        """One draw: a row of PROMPTS, or a row of REJECTED."""
        try:
            segments, flags = self.recipes[task].make(self.draw(row, local_uri))
        except RowError as error:
            return rejected_row(row, error.status, f"{task}: {error}")
        except Exception as error:  # noqa: BLE001 - the row boundary: one bad row must not stop the job
            return rejected_row(row, Status.BAD_ROW, f"{task}: {type(error).__name__}: {error}")
        documents = sum(s["role"] == Role.RETRIEVED and s["type"] == "image" for s in segments)
        return {
            **row,
            "prompt_id": prompt_id(task, row["clip_id"], self.config_hash),
            "task": task,
            "segments": [text(self.recipes[task].instruction, Role.INSTRUCTION), *segments],
            "num_documents": documents,
            "flags": flags,
            "config_hash": self.config_hash,
        }


def _count(made: list[Row]) -> dict[str, int]:
    """Facts of a shard: rows by task, pictures by role, flags."""
    counts = Counter(f"task.{row['task']}" for row in made)
    counts.update(f"flag.{flag}" for row in made for flag in row["flags"])
    counts.update(f"picture.{s['role']}" for row in made for s in row["segments"] if s["type"] == "image")
    return dict(counts)


def _finish(
    config: InstructConfig, inputs: dict[str, str], units: list[Unit], receipts: Receipts
) -> Certificate:
    """Gather the receipts in order; write the tables beside the shards; account for every draw."""
    entries: list[FileEntry] = []
    rejected: list[Row] = []
    facts: Counter[str] = Counter()
    fates: Counter[str] = Counter()
    similarities = [0] * BINS
    for _, receipt in receipts.in_order(units):
        if receipt["entry"]:
            entries.append(FileEntry.model_validate(receipt["entry"]))
        rejected += receipt["rejected"]
        facts.update(receipt["counts"])
        fates.update(receipt["compared"]["fates"])
        similarities = [a + b for a, b in zip(similarities, receipt["compared"]["similarities"], strict=True)]
    counts = Counter[str](row["status"] for row in rejected)
    counts[Status.OK] = sum(e.rows for e in entries)
    what = "draws could not become instructions"
    refuse_failures(counts, config.max_failed_frac, what=what, rejected=rejected)
    meta = write_meta(config.out, entries, row_group_rows=config.row_group_rows)
    files = [*entries, meta, write_rejected(config.out, rejected)]
    if config.pairs != "in_pair" and config.crops is not None:  # without subjects nothing was compared
        pairs = (pair for _, receipt in receipts.in_order(units) for pair in receipt["compared"]["pairs"])
        files.append(write_shard(join(config.out, PAIRS_FILE), pairs, PAIRS, row_group_rows=1 << 16))
    return Certificate(
        job=JOB,
        config_hash=output_hash(config, inputs),
        **count_fates(counts),
        files=files,
        inputs=inputs,
        facts=_facts(facts, rejected) | _pair_facts(config, fates, similarities),
    )


def _pair_facts(config: InstructConfig, fates: Counter[str], similarities: list[int]) -> dict[str, Any]:
    """What was compared, by fate, and how similar it was."""
    if config.pairs == "in_pair" or config.crops is None:
        return {}
    told = ", ".join(f"{fate.replace('_', ' ')} {count:,}" for fate, count in sorted(fates.items()))
    drawn = draw_histogram(similarities)
    remarks = [f"similarity of {fates.total():,} cross-pairs, 0 to 1: |{drawn}| {told or 'none'}"]
    clip = require_certificate(config.crops, job=CROPS_JOB, made_by="vimi-data subjects").facts["clip"]
    if clip != OFFLINE and config.similarity == InstructConfig.model_fields["similarity"].default:
        told = f"the bounds similarity were measured with the offline CLIP, and these vectors are of {clip}"
        remarks.append(f"{told}: set them by this histogram")
    return {"pairs": dict(sorted(fates.items())), "similarities": similarities, "remarks": remarks}


def _facts(counts: Counter[str], rejected: list[Row]) -> dict[str, Any]:
    def below(prefix: str) -> dict[str, int]:
        return {k.removeprefix(prefix): n for k, n in sorted(counts.items()) if k.startswith(prefix)}

    return {
        "accounting": "one draw is a clip and a task",
        "tasks": below("task."),
        "pictures": below("picture."),
        "flags": below("flag."),
        "reasons": dict(Counter(row["error"] for row in rejected).most_common(12)),
    }
