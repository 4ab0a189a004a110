"""Prompts of stage 1 -> instructions of stage 2: the three tasks of VIMI, one schema, exactly once.

    certified prompts --row groups--> workers: frames, masks, segments --> one shard a unit --> certificate

A *draw* is a clip and a task. Every draw ends as an instruction or leaves with a status and a reason:
a caption without a subject can't be subject-driven, a picture has no first frame to go on from, a row
without documents can't be retrieval-augmented.
"""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from infra.claim import open_job
from infra.cluster import ray_session
from infra.config import canonical_json
from infra.errors import ConfigError, TooManyFailuresError
from infra.storage import (
    Certificate,
    FileEntry,
    absolute,
    filesystem,
    join,
    list_files,
    require_certificate,
    sha256_file,
    write_certificate,
)
from pipeline.job import Receipts, Unit, run_units
from pipeline.prompts.instruct.config import JOB, PLACES, InstructConfig, weights
from pipeline.prompts.instruct.worker import make_worker
from pipeline.prompts.subjects.mask import OFFLINE, model_path
from pipeline.schema import REJECTED, Status, Task, content_id
from pipeline.shards import REJECTED_FILE, ShardSet, write_meta, write_shard


def check(config: InstructConfig) -> ShardSet:
    """Refuse at the door what can't work; starts nothing.

    Raises:
        ConfigError: no certified prompts or clips, an unknown mask model or CLIP, weights all zero.
    """
    require_certificate(config.prompts, job="augment", made_by="vimi-data augment")
    shards = ShardSet(config.prompts)
    if config.clips is not None:
        require_certificate(config.clips, job="crawl", made_by="vimi-data crawl")
    if shards.num_rows == 0:
        raise ConfigError(f"{config.prompts} holds no prompts", cure="see its rejected.parquet for the reasons")
    if Task.SUBJECT_DRIVEN in config.tasks:
        model_path(config.subjects.mask.model)
        if config.subjects.clip is not None:
            from infra.clip.load import check_clip

            check_clip(config.subjects.clip)
    if config.draw == "one" and not sum(weights(config)):
        raise ConfigError("proportions leave no task", legal="at least one weight above 0")
    return shards


def run(config: InstructConfig) -> Certificate:
    """Make the instructions; the same command starts and resumes.

    Raises:
        ConfigError: see `check`.
        TooManyFailuresError: more draws died than `max_failed_frac` allows.
    """
    shards = check(config)
    config = with_absolute_paths(config)
    started_s = time.time()
    inputs = {"prompts": shards.certificate.content_hash()}
    done = open_job(config.out, job=JOB, config=config, inputs=inputs, hash_exclude=PLACES)
    if done is not None:
        return done
    config_hash = hash_of(config, inputs)
    out = config.out
    units = list(plan_units(config, shards))
    with ray_session(config.ray):
        receipts = run_units(
            out,
            units,
            partial(make_worker, config, config_hash, shards.uri, out),
            what=JOB,
            total=len(units),
            num_workers=config.num_workers,
        )
    certificate = _certify(config, config_hash, out, units, receipts, inputs, started_s)
    write_certificate(out, certificate)
    receipts.clear()
    return certificate


def with_absolute_paths(config: InstructConfig) -> InstructConfig:
    """The same config for every process: workers run in a folder of their own."""
    subjects = config.subjects
    if subjects.mask.model != OFFLINE:
        mask = subjects.mask.model_copy(update={"model": str(model_path(subjects.mask.model))})
        subjects = subjects.model_copy(update={"mask": mask})
    if subjects.clip is not None:
        paths = {name: getattr(subjects.clip, name) for name in ("name", "pretrained")}
        found = {name: absolute(text) for name, text in paths.items() if Path(text).is_file()}
        subjects = subjects.model_copy(update={"clip": subjects.clip.model_copy(update=found)})
    places = {"out": absolute(config.out), "prompts": absolute(config.prompts), "subjects": subjects}
    return config.model_copy(update=places)


def hash_of(config: InstructConfig, inputs: dict[str, str]) -> str:
    """16 hex digits: what the output depends on, and not where anything lies."""
    values = config.model_dump(mode="json", exclude={"out", "ray", "num_workers", *PLACES})
    if Task.SUBJECT_DRIVEN in config.tasks:
        values["subjects"]["mask"]["model"] = sha256_file(str(model_path(config.subjects.mask.model)))
    return content_id(canonical_json([values, inputs]).decode())[:16]


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
        if not file.rpartition("/")[2].startswith("part-"):
            continue
        fs, path = filesystem(file)
        columns = ["clip_id", "source_uri", "local_uri"]
        for row in pq.read_table(path, columns=columns, filesystem=fs).to_pylist():
            if row["local_uri"] and row["local_uri"] != row["source_uri"]:
                moved[row["clip_id"]] = row["local_uri"]
    return moved


def _certify(
    config: InstructConfig,
    config_hash: str,
    out: str,
    units: list[Unit],
    receipts: Receipts,
    inputs: dict[str, str],
    started_s: float,
) -> Certificate:
    """Write the sidecars and account for every draw."""
    entries: list[FileEntry] = []
    rejected: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for _, receipt in receipts.in_order(units):
        if receipt["entry"]:
            entries.append(FileEntry.model_validate(receipt["entry"]))
        rejected += receipt["rejected"]
        counts.update(receipt["counts"])
    statuses = Counter(Status(row["status"]) for row in rejected)
    num_out, num_dead = sum(e.rows for e in entries), sum(n for s, n in statuses.items() if s.is_dead)
    total = num_out + len(rejected)
    if num_dead > config.max_failed_frac * total:
        raise TooManyFailuresError(
            f"{num_dead:,} of {total:,} draws failed, max_failed_frac is {config.max_failed_frac}; "
            f"by status: {dict(statuses)}"
        )
    meta = write_meta(out, entries, row_group_rows=config.row_group_rows)
    fates = write_shard(join(out, REJECTED_FILE), rejected, REJECTED, row_group_rows=1 << 20)
    return Certificate(
        job=JOB,
        config_hash=config_hash,
        num_in=total,
        num_out=num_out,
        filtered={s.value: n for s, n in sorted(statuses.items()) if s.is_filtered},
        dead={s.value: n for s, n in sorted(statuses.items()) if s.is_dead},
        files=[*entries, meta, fates],
        inputs=inputs,
        facts=_facts(config, counts, rejected),
        created_at_s=time.time(),
        wall_s=time.time() - started_s,
    )


def _facts(config: InstructConfig, counts: Counter[str], rejected: list[dict[str, Any]]) -> dict[str, Any]:
    def below(prefix: str) -> dict[str, int]:
        return {k.removeprefix(prefix): n for k, n in sorted(counts.items()) if k.startswith(prefix)}

    facts: dict[str, Any] = {
        "accounting": "one draw is a clip and a task",
        "tasks": below("task."),
        "pictures": below("picture."),
        "flags": below("flag."),
        "reasons": dict(Counter(row["error"] for row in rejected).most_common(12)),
    }
    if Task.SUBJECT_DRIVEN in config.tasks:
        path = model_path(config.subjects.mask.model)
        facts["mask_model"] = {"name": config.subjects.mask.model, "sha256": sha256_file(str(path))}
    return facts
