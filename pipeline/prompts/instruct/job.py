"""Prompts of stage 1 -> instructions of stage 2: the three tasks of VIMI, one schema, exactly once.

    certified prompts --row groups--> workers: frames, masks, segments --> one shard a unit --> certificate

A *draw* is a clip and a task. Every draw ends as an instruction or leaves with a status and a reason:
a caption without a subject can't be subject-driven, a picture has no first frame to go on from, a row
without documents can't be retrieval-augmented.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow.parquet as pq

from infra.errors import ConfigError
from infra.storage import (
    Certificate,
    FileEntry,
    filesystem,
    list_files,
    require_certificate,
    sha256_file,
)
from pipeline.job import (
    Receipts,
    Unit,
    count_fates,
    output_hash,
    refuse_failures,
    run_job,
    run_units,
)
from pipeline.prompts.instruct.config import JOB, InstructConfig, weights
from pipeline.prompts.instruct.worker import make_worker
from pipeline.prompts.subjects.mask import model_path
from pipeline.schema import Status, Task
from pipeline.shards import ShardSet, write_meta, write_rejected


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
    inputs = input_hashes(config, shards)
    units = list(plan_units(config, shards))
    worker = partial(make_worker, config, output_hash(config, inputs), shards.uri, config.out)
    work = partial(
        run_units, config.out, units, worker, what=JOB, total=len(units), num_workers=config.num_workers
    )
    finish = partial(_finish, config, inputs, units)
    return run_job(JOB, config, inputs, work=work, finish=finish)


def input_hashes(config: InstructConfig, shards: ShardSet) -> dict[str, str]:
    """What the output is made of, besides the config."""
    hashes = {"prompts": shards.certificate.content_hash()}
    if Task.SUBJECT_DRIVEN in config.tasks:
        hashes["mask_model"] = sha256_file(str(model_path(config.subjects.mask.model)))
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
        if not file.rpartition("/")[2].startswith("part-"):
            continue
        fs, path = filesystem(file)
        columns = ["clip_id", "source_uri", "local_uri"]
        for row in pq.read_table(path, columns=columns, filesystem=fs).to_pylist():
            if row["local_uri"] and row["local_uri"] != row["source_uri"]:
                moved[row["clip_id"]] = row["local_uri"]
    return moved


def _finish(
    config: InstructConfig, inputs: dict[str, str], units: list[Unit], receipts: Receipts
) -> Certificate:
    """Gather the receipts in order; write the tables beside the shards; account for every draw."""
    entries: list[FileEntry] = []
    rejected: list[dict[str, Any]] = []
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
        facts=_facts(config, facts, rejected),
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
