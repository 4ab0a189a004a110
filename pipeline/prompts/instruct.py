"""`vimi-data instruct`: prompts of stage 1 -> instructions of stage 2, one schema, exactly once.

    certified prompts --row groups--> workers: frames, masks, segments --> one shard a unit --> certificate

A *draw* is a clip and a task. Every draw ends as an instruction or leaves with a status and a reason:
a caption without a subject can't be subject-driven, a picture has no first frame to go on from, a row
without documents can't be retrieval-augmented.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import Field, field_validator

from infra.certificate import Certificate, FileEntry, require_certificate
from infra.config import Incidental, Location
from infra.errors import ConfigError
from infra.storage import join, list_files
from pipeline.job import JobConfig, count_fates, output_hash, refuse_failures, run_job, run_units
from pipeline.journal import Receipt, Receipts, Unit
from pipeline.prompts.subjects.finder import SubjectConfig, SubjectFinder, check_subjects, networks
from pipeline.prompts.tasks import RECIPES, Draw, Recipe, Row, draw_tasks, text
from pipeline.schema import PROMPTS, Role, RowError, Status, Task, prompt_id
from pipeline.shards import (
    ShardSet,
    is_shard,
    open_part,
    rejected_row,
    shard_name,
    write_meta,
    write_rejected,
    write_shard,
)

JOB = "instruct"


class InstructConfig(JobConfig):
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
    """How words become pictures."""
    unit_rows: int = Field(default=64, ge=1, le=65536)
    """About how many prompts make one unit of work and one output shard: what a kill loses at most, for
    each worker. Ours: about 30 MB with all three tasks; give 1,024 for corpora of many millions."""
    row_group_rows: int = Field(default=64, ge=1, le=65536)
    """Rows of an output row group: the trainer's unit of reading."""
    num_gpus: Incidental[float] = Field(default=0.0, ge=0, le=64)
    """GPUs of a worker, for `subjects`; 0 = CPUs. With GPUs workers live as long as the job."""
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
    require_certificate(config.prompts, job="augment", made_by="vimi-data augment")
    shards = ShardSet(config.prompts)
    if config.clips is not None:
        require_certificate(config.clips, job="crawl", made_by="vimi-data crawl")
    if shards.num_rows == 0:
        raise ConfigError(f"{config.prompts} holds no prompts", cure="see its rejected.parquet for the reasons")
    if Task.SUBJECT_DRIVEN in config.tasks:
        check_subjects(config.subjects)
    if config.proportions and not sum(config.proportions.get(task, 1.0) for task in config.tasks):
        raise ConfigError("proportions leave no task", legal="at least one weight above 0")
    return shards


def run(config: InstructConfig) -> Certificate:
    """Make the instructions; the same command starts and resumes.

    Raises:
        ConfigError: see `check`.
        TooManyFailuresError: more draws died than `max_failed_frac` allows.
    """
    shards = check(config)
    inputs = input_hashes(config, shards)
    units = list(plan_units(config, shards))
    recipes = {task: RECIPES[task] for task in config.tasks}
    worker = partial(InstructWorker, config, output_hash(config, inputs), recipes)
    work = partial(
        run_units,
        config.out,
        units,
        worker,
        what=JOB,
        total=len(units),
        num_workers=config.num_workers,
        num_gpus=config.num_gpus,
        actors=config.num_gpus > 0,
    )
    finish = partial(_finish, config, inputs, units)
    return run_job(JOB, config, inputs, work=work, finish=finish)


def input_hashes(config: InstructConfig, shards: ShardSet) -> dict[str, str]:
    """What the output is made of, besides the config."""
    hashes = {"prompts": shards.certificate.content_hash()}
    if Task.SUBJECT_DRIVEN in config.tasks:
        hashes |= networks(config.subjects)
    return hashes


def plan_units(config: InstructConfig, shards: ShardSet) -> Iterator[Unit]:
    """Runs of whole row groups of about `unit_rows` rows, numbered in order; each makes one shard."""
    moved = _moved_sources(config.clips) if config.clips else {}
    groups: list[int] = []
    rows = number = 0
    for index, group in enumerate(shards.row_groups):
        groups.append(index)
        rows += group.num_rows
        if rows >= config.unit_rows or index + 1 == len(shards):
            ids = [i for g in groups for i in shards.read_row_group(g, ["clip_id"])["clip_id"].to_pylist()]
            local = {i: moved[i] for i in ids if i in moved}
            yield Unit(f"unit-{number:06d}", {"number": number, "row_groups": groups, "local": local})
            groups, rows, number = [], 0, number + 1


def _moved_sources(clips: str) -> dict[str, str]:
    """clip_id -> where its bytes lie, for the clips whose bytes don't lie at `source_uri`."""
    moved = {}
    for file in list_files(clips, suffix=".parquet", recursive=False):
        if not is_shard(file):
            continue
        columns = ["clip_id", "source_uri", "local_uri"]
        for row in open_part(file).read(columns).to_pylist():
            if row["local_uri"] and row["local_uri"] != row["source_uri"]:
                moved[row["clip_id"]] = row["local_uri"]
    return moved


class InstructWorker:
    """Turns a run of row groups into one shard of instructions and a receipt."""

    def __init__(self, config: InstructConfig, config_hash: str, recipes: Mapping[str, Recipe]) -> None:
        self.config, self.config_hash, self.recipes = config, config_hash, recipes
        self.shards = ShardSet(config.prompts)
        self.finder = SubjectFinder(config.subjects, "cuda" if config.num_gpus else "cpu")

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        made: list[Row] = []
        rejected: list[Row] = []
        for group in payload["row_groups"]:
            for row in self.shards.read_row_group(group).to_pylist():
                for task in self.tasks_of(row["clip_id"]):
                    result = self.instruct(row, task, payload["local"].get(row["clip_id"]))
                    (made if "prompt_id" in result else rejected).append(result)
        entry = None
        if made:
            place = join(self.config.out, shard_name(payload["number"]))
            entry = write_shard(place, made, PROMPTS, row_group_rows=self.config.row_group_rows).model_dump()
        notes = dict(Counter(row["status"] for row in rejected))
        return {"entry": entry, "rejected": rejected, "counts": _count(made), "notes": notes}

    def tasks_of(self, clip_id: str) -> list[str]:
        config = self.config
        return draw_tasks(config.tasks, config.proportions, seed=config.seed, clip_id=clip_id)

    def instruct(self, row: Row, task: str, local_uri: str | None) -> Row:
        """One draw: a row of PROMPTS, or a row of REJECTED."""
        try:
            segments, flags = self.recipes[task].make(Draw(row, local_uri, self.finder, self.config.seed))
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
    for _, receipt in receipts.in_order(units):
        if receipt["entry"]:
            entries.append(FileEntry.model_validate(receipt["entry"]))
        rejected += receipt["rejected"]
        facts.update(receipt["counts"])
    counts = Counter[str](row["status"] for row in rejected)
    counts[Status.OK] = sum(e.rows for e in entries)
    what = "draws could not become instructions"
    refuse_failures(counts, config.max_failed_frac, what=what, rejected=rejected)
    meta = write_meta(config.out, entries, row_group_rows=config.row_group_rows)
    return Certificate(
        job=JOB,
        config_hash=output_hash(config, inputs),
        **count_fates(counts),
        files=[*entries, meta, write_rejected(config.out, rejected)],
        inputs=inputs,
        facts=_facts(facts, rejected),
    )


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
