"""The job of `vimi-data benchmark`: reads a user's copy of a dataset, writes prompts and an exclusion list."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import Field

from infra.certificate import Certificate, FileEntry, file_entries, write_certificate
from infra.claim import open_job
from infra.config import Incidental, Location
from infra.errors import ConfigError, DataError
from infra.storage import exists, is_file, join, sha256_file, write_bytes
from pipeline.job import output_hash
from pipeline.prompts.benchmark.item import Exam, Row, as_row
from pipeline.prompts.benchmark.msrvtt import read_msrvtt
from pipeline.prompts.benchmark.own import read_own
from pipeline.prompts.benchmark.personalization import Pictures, read_personalization
from pipeline.prompts.benchmark.ucf101 import read_ucf101
from pipeline.prompts.exclusion import exclusion_of
from pipeline.prompts.user_prompt import UserRetrievalConfig, check_retrieval, open_retriever
from pipeline.schema import PROMPTS, content_id
from pipeline.shards import shard_name, write_meta, write_shard

JOB = "benchmark"
EXCLUDE = "exclude.jsonl"
ROWS_PER_SHARD, ROWS_PER_GROUP = 1024, 64


class BenchmarkConfig(UserRetrievalConfig):
    """Which protocol, and where the user's copy of its data is."""

    protocol: Literal["ucf101", "msrvtt", "personalization", "own"]
    """ucf101: zero-shot UCF101. msrvtt: captions of MSR-VTT. personalization: MSRVTT-Personalization. own:
    held-out rows of our own output."""
    source: Incidental[Location]
    """The user's copy; one whose layout doesn't fit is refused with what was expected."""
    out: Incidental[Location]
    """Folder or URI of the prompts."""
    subset: Literal["train", "test", "all"] = "test"
    """Of UCF101: whose videos give the distribution of the classes, and are the real ones."""
    fold: int = Field(default=1, ge=1, le=3)
    """Of UCF101: which of its three lists."""
    videos: int = Field(default=10_000, ge=1, le=10_000_000)
    """Of UCF101: how many prompts; 10,000 by the protocol of Make-A-Video and Snap Video."""
    class_prompts: Location | None = None
    """Of UCF101: JSON or YAML file of a prompt for each class; null = the class names."""
    split: str = "test"
    """Of MSR-VTT."""
    captions_per_video: int | None = Field(default=None, ge=1)
    """Of MSR-VTT: null = all 20, as the protocol has it."""
    mode: Literal["subject", "face"] = "subject"
    """Of MSRVTT-Personalization: videos with exactly one subject, or exactly one face."""
    pictures: Pictures = "single"
    """Of MSRVTT-Personalization: the middle picture of the subject, all of them, or all and the background."""
    held_out_frac: float = Field(default=0.01, ge=0, lt=1)
    """Of own data: as in the training's validation.held_out_frac, so that the same clips are kept back."""
    instruct: bool = False
    """Put the task's instruction line in front of prompts with documents, as stage 2 has learned it."""


def read_exam(config: BenchmarkConfig) -> Exam:
    """The protocol's items.

    Raises:
        ConfigError: the user's copy doesn't fit, or nothing is asked for.
    """
    if not exists(config.source) or is_file(config.source):
        got = f"{config.source} is a file" if exists(config.source) else f"no folder {config.source}"
        raise ConfigError(got, cure="give the folder of your copy of the data")
    exam = _read_protocol(config)
    if not exam.items:
        facts = ", ".join(f"{name} {value}" for name, value in exam.facts.items() if name != "remarks")
        raise ConfigError(
            f"no prompt of {config.protocol} in {config.source} ({facts})",
            legal="a copy with one at least",
            cure="complete the copy, or ask for another subset, split or mode",
        )
    return exam


def _read_protocol(config: BenchmarkConfig) -> Exam:
    match config.protocol:
        case "ucf101":
            how = {"subset": config.subset, "fold": config.fold, "count": config.videos}
            return read_ucf101(config.source, class_prompts=config.class_prompts, **how)
        case "msrvtt":
            return read_msrvtt(config.source, split=config.split, captions_per_video=config.captions_per_video)
        case "personalization":
            return read_personalization(config.source, mode=config.mode, pictures=config.pictures)
        case "own":
            return read_own(config.source, held_out_frac=config.held_out_frac)


def check(config: BenchmarkConfig) -> str:
    """Refuse what can't work; the plan in words."""
    exam, memory = read_exam(config), check_retrieval(config)
    documents = f", documents from {memory.version} of {memory.uri}" if memory else ""
    facts = ", ".join(f"{name} {value}" for name, value in exam.facts.items() if name != "remarks")
    return f"{len(exam.items):,} prompts of {config.protocol} ({facts}){documents}"


def run(config: BenchmarkConfig) -> Certificate:
    """Write the prompts and the exclusion list; the same command finds them written."""
    exam, memory = read_exam(config), check_retrieval(config)
    inputs = {"items": content_id(*(f"{item.key} {item.caption}" for item in exam.items))}
    if memory is not None:
        inputs["memory"] = content_id(memory.version, memory.model_hash)
    done = open_job(config.out, job=JOB, config=config, inputs=inputs)
    if done is not None:
        return done
    captions = list(dict.fromkeys(item.caption for item in exam.items))
    listed = with_hashes(exam.listed)
    own = exclusion_of(listed, source_pattern=config.guard.source_pattern)  # no prompt is given its answer
    retriever = open_retriever(config, memory, own) if memory else None
    found = {row["caption"]: row for row in retriever(captions)} if retriever else {}
    config_hash = output_hash(config, inputs)
    rows = [
        as_row(item, config.protocol, config_hash, found.get(item.caption), instruct=config.instruct)
        for item in exam.items
    ]
    certificate = Certificate(
        job=JOB,
        config_hash=config_hash,
        num_in=len(rows),
        num_out=len(rows),
        files=[*write_rows(config.out, rows), write_exclusion(config.out, listed)],
        inputs=inputs,
        facts={
            "protocol": config.protocol,
            "tasks": sorted({row["task"] for row in rows}),
            "highlights": {name: str(value) for name, value in exam.facts.items() if name != "remarks"},
            "remarks": exam.facts.get("remarks", []),
        },
    )
    write_certificate(config.out, certificate)
    return certificate


def write_rows(out: str, rows: list[Row]) -> Iterator[FileEntry]:
    """The shards, and their index last."""
    shards = [
        write_shard(
            join(out, shard_name(number)),
            rows[first : first + ROWS_PER_SHARD],
            PROMPTS,
            row_group_rows=ROWS_PER_GROUP,
        )
        for number, first in enumerate(range(0, len(rows), ROWS_PER_SHARD))
    ]
    yield from shards
    yield write_meta(out, shards, row_group_rows=ROWS_PER_GROUP)


def with_hashes(listed: list[dict[str, str]]) -> list[dict[str, str]]:
    """Entries of an exclusion list with the sha256 of those that are local files."""
    with ThreadPoolExecutor(8) as pool:  # hashing lets go of the interpreter
        return list(pool.map(_with_hash, listed))


def write_exclusion(out: str, listed: list[dict[str, str]]) -> FileEntry:
    """exclude.jsonl: what may neither be retrieved nor trained on, by name and, where known, by content."""
    place = join(out, EXCLUDE)
    lines = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in listed)
    write_bytes(place, lines.encode())
    return file_entries(out, [place])[0]


def _with_hash(entry: dict[str, str]) -> dict[str, str]:
    source = None if "source_sha256" in entry else entry.get("source_uri")
    try:
        return {**entry, "sha256": sha256_file(source)} if source else entry
    except (OSError, DataError):
        return entry  # a name is listed even if its file is gone
