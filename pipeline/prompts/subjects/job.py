"""`vimi-data subjects`: prompts of stage 1 -> the table of crops, exactly once.

    certified prompts --row groups--> workers: frames, phrases, masks --> one shard a unit --> certificate

Every phrase in every frame is a row: found, or left out with a reason. `vimi-data instruct --crops` reads it.
"""

from collections import Counter
from functools import partial
from typing import Any

from pydantic import Field

from infra.certificate import Certificate, FileEntry
from infra.config import Incidental, Location
from infra.storage import join
from pipeline.job import NetworkJobConfig, count_fates, output_hash, refuse_failures, run_job, run_networks
from pipeline.journal import Receipt, Receipts, Unit
from pipeline.prompts.inputs import check_prompts, plan_units
from pipeline.prompts.subjects.crops import (
    JOB,
    Row,
    clip_crops,
    document_crops,
    places_of,
    reason_of,
)
from pipeline.prompts.subjects.finder import SubjectConfig, SubjectFinder, check_subjects, networks
from pipeline.prompts.tasks import generator
from pipeline.schema import CROP_PLACES, CROPS, Status
from pipeline.shards import PLACES_FILE, ShardSet, shard_name, write_shard


class CropsConfig(NetworkJobConfig):
    """Prompts of stage 1 -> the table of crops."""

    prompts: Incidental[Location]
    """Output folder of `vimi-data augment`: captions, retrieved documents, where the clips lie."""
    clips: Incidental[Location | None] = None
    """Output folder of `vimi-data crawl`; needed only where the sources were fetched from URLs, to find
    the fetched bytes."""
    subjects: SubjectConfig = SubjectConfig()
    """How words become pictures."""
    documents: int = Field(default=2, ge=0, le=1000)
    """How many of a clip's retrieved documents are looked into as well: references of things that do not live
    may come from there. Ours."""
    unit_rows: int = Field(default=64, ge=1, le=65536)
    """About how many clips make one unit of work and one shard: what a kill loses at most, for each worker."""
    row_group_rows: int = Field(default=64, ge=1, le=65536)
    """Rows of a row group: what `instruct` reads at once."""
    seed: int = 0
    """Gives the order in which a clip's frames are looked at; that of `instruct` gives the same cut-outs."""
    max_failed_frac: Incidental[float] = Field(default=0.5, ge=0, le=1)
    """Greatest share of clips that may die (unreadable sources) before the job fails."""


def check(config: CropsConfig) -> ShardSet:
    """Refuse what can't work before Ray starts.

    Raises:
        ConfigError: no certified prompts or clips, unknown networks.
    """
    shards = check_prompts(config.prompts, config.clips)
    check_subjects(config.subjects)
    return shards


def run(config: CropsConfig) -> Certificate:
    """Make the table; the same command starts and resumes.

    Raises:
        ConfigError: see `check`.
        TooManyFailuresError: more clips died than `max_failed_frac` allows.
    """
    shards = check(config)
    inputs = {"prompts": shards.certificate.content_hash(), **networks(config.subjects)}
    units = list(plan_units(shards, config.clips, config.unit_rows))
    worker = partial(CropsWorker, config)
    work = partial(run_networks, config, units, worker, what=JOB)
    return run_job(JOB, config, inputs, work=work, finish=partial(_finish, config, inputs, units))


class CropsWorker:
    """Turns a run of row groups into one shard of crops and a receipt."""

    def __init__(self, config: CropsConfig) -> None:
        self.config = config
        self.shards = ShardSet(config.prompts)
        self.finder = SubjectFinder(config.subjects, "cuda" if config.num_gpus else "cpu")

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        crops: list[Row] = []
        for group in payload["row_groups"]:
            for row in self.shards.read_row_group(group).to_pylist():
                crops += self.crops(row, payload["local"].get(row["clip_id"]))
        name, size = shard_name(payload["number"]), self.config.row_group_rows
        entry = write_shard(join(self.config.out, name), crops, CROPS, row_group_rows=size)
        fates = Counter(crop["status"] for crop in crops)
        facts = Counter(f"reason.{reason_of(crop)}" for crop in crops if crop["status"] != Status.OK)
        facts.update(f"nature.{crop['nature']}" for crop in crops if crop["status"] == Status.OK)
        facts["clips"] = len({crop["clip_id"] for crop in crops})
        facts["shown"] = len({c["clip_id"] for c in crops if c["status"] == Status.OK and c["doc_id"] is None})
        facts["of_documents"] = sum(c["doc_id"] is not None and c["status"] == Status.OK for c in crops)
        failed = [crop for crop in crops if Status(crop["status"]).is_dead and crop["doc_id"] is None]
        dead = [{name: crop[name] for name in ("source_uri", "status", "error")} for crop in failed]
        clips = Counter(crop["status"] for crop in failed)  # a clip that can't be read is one row
        clips[Status.OK] = facts["clips"] - len(failed)
        notes = {status: count for status, count in fates.items() if status != Status.OK}
        counts = {"fates": dict(fates), "facts": dict(facts), "clips": dict(clips)}
        places = places_of(crops, name, row_group_rows=size)
        return {"entry": entry.model_dump(), **counts, "dead": dead[:1], "places": places, "notes": notes}

    def crops(self, row: Row, local_uri: str | None) -> list[Row]:
        random = generator(self.config.seed, row["clip_id"], "subject")
        own = clip_crops(row, self.finder, random, local_uri=local_uri)
        return own + document_crops(row, self.finder, at_most=self.config.documents)


def _finish(config: CropsConfig, inputs: dict[str, str], units: list[Unit], receipts: Receipts) -> Certificate:
    """Gather the receipts in order; account for every row."""
    entries: list[FileEntry] = []
    fates: Counter[str] = Counter()
    facts: Counter[str] = Counter()
    clips: Counter[str] = Counter()
    dead = []
    for _, receipt in receipts.in_order(units):
        entries.append(FileEntry.model_validate(receipt["entry"]))
        fates.update(receipt["fates"])
        facts.update(receipt["facts"])
        clips.update(receipt["clips"])
        dead += receipt["dead"]
    refuse_failures(clips, config.max_failed_frac, what="clips could not be looked into", rejected=dead)
    places = (place for _, receipt in receipts.in_order(units) for place in receipt["places"])
    index = write_shard(join(config.out, PLACES_FILE), places, CROP_PLACES, row_group_rows=1 << 16)

    def below(prefix: str) -> dict[str, int]:
        found = {key.removeprefix(prefix): n for key, n in facts.items() if key.startswith(prefix)}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    return Certificate(
        job=JOB,
        config_hash=output_hash(config, inputs),
        **count_fates(fates),
        files=[*entries, index],
        inputs=inputs,
        facts={
            "accounting": "one row is a phrase in a frame, or a clip or document without one",
            "clip": None if config.subjects.clip is None else config.subjects.clip.name,
            "clips": facts["clips"],
            "clips_with_a_picture": facts["shown"],
            "of_documents": facts["of_documents"],
            "natures": below("nature."),
            "reasons": below("reason."),
            "remarks": [f"{facts['shown']:,} of {facts['clips']:,} clips have a picture for a word"],
        },
    )
