"""Reads what goes on the page: certificates, shards, run folders. Missing parts are None or empty."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from infra.certificate import Certificate, read_certificate, read_sealed
from infra.claim import read_job_config
from infra.config import Config
from infra.run_folder import RunFolder
from infra.storage import absolute, exists, is_remote, join
from pipeline.report.scores import Evaluation, read_evaluation
from pipeline.shards import ShardSet, is_shard, open_part

EVIDENCE = "evidence.json"
"""What `vimi-data judge` leaves beside its page."""
MAX_ROWS = 200_000
"""Rows read for the distributions; more are sampled evenly, by row group. Ours."""


class ReportConfig(Config):
    """Which outputs go on the page, and how large it may be."""

    out: str
    """The HTML file to write, or a folder (then `report.html` in it)."""
    clips: str | None = None
    """Output folder of `vimi-data crawl`."""
    memory: str | None = None
    """Output folder of `vimi-data build-index`."""
    prompts: str | None = None
    """Output folder of `vimi-data augment`."""
    crops: str | None = None
    """Output folder of `vimi-data subjects`."""
    instructions: str | None = None
    """Output folder of `vimi-data instruct`."""
    runs: tuple[str, ...] = ()
    """Run folders of `vimi-train stage1` and `stage2`, in this order; unfinished ones too."""
    samples: tuple[str, ...] = ()
    """Output folders of `vimi-train sample`."""
    scores: tuple[str, ...] = ()
    """Output folders of `vimi-train evaluate`."""
    evidence: str | None = None
    """Output folder of `vimi-data judge`: the page opens with it."""
    max_bytes: int = Field(default=15_000_000, ge=200_000)
    """Size of the page, bytes: pictures that would exceed it are left out, and the page says so.
    15 MB: what most mail servers let through."""


@dataclass(frozen=True)
class Run:
    """A training's folder."""

    name: str
    uri: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    certificate: Certificate | None


@dataclass(frozen=True)
class Parts:
    """All inputs of the page."""

    clips: str | None
    memory: str | None
    prompts: ShardSet | None
    instructions: ShardSet | None
    runs: list[Run]
    samples: tuple[str, ...]
    certificates: dict[str, tuple[str, Certificate]]
    """Job -> its folder and certificate, in the order of the flow."""
    evaluations: list[Evaluation] = field(default_factory=list)
    crops: str | None = None
    """Folder of the table of crops."""
    evidence: dict[str, Any] | None = None
    """What `judge` found: claims, titles, strips."""


def read_parts(config: ReportConfig) -> Parts:
    """Open every output that the config names."""
    certificates = {}
    folders = {
        "crawl": config.clips,
        "build-index": config.memory,
        "augment": config.prompts,
        "subjects": config.crops,
        "instruct": config.instructions,
    }
    for job, folder in folders.items():
        certificate = read_certificate(folder, job=job) if folder else None
        if folder and certificate:
            certificates[job] = (absolute(folder), certificate)
    return Parts(
        clips=absolute(config.clips) if config.clips else None,
        memory=absolute(config.memory) if config.memory else None,
        prompts=ShardSet(config.prompts) if config.prompts else None,
        instructions=ShardSet(config.instructions) if config.instructions else None,
        runs=[read_run(folder) for folder in config.runs],
        samples=config.samples,
        crops=absolute(config.crops) if config.crops else None,
        evaluations=[read_evaluation(folder) for folder in config.scores],
        evidence=read_sealed(join(absolute(config.evidence), EVIDENCE)) if config.evidence else None,
        certificates=certificates,
    )


def read_run(uri: str) -> Run:
    """A run folder, finished or not."""
    folder = RunFolder(absolute(uri))
    has_config = not is_remote(folder.uri) and exists(folder.config)
    return Run(
        name=folder.name,
        uri=folder.uri,
        config=read_job_config(folder.uri) if has_config else {},
        records=folder.records(),
        certificate=read_certificate(folder.uri),
    )


def previews(run: Run) -> list[tuple[str, str]]:
    """(label, folder) of videos that the run sampled while training: its first and its last ones."""
    folder = RunFolder(run.uri)
    positions = folder.sampled_positions()
    chosen = positions if len(positions) < 2 else [positions[0], positions[-1]]
    return [(f"{run.name} at {position:,} samples", folder.samples(position)) for position in chosen]


def table_files(folder: str) -> Iterator[pq.ParquetFile]:
    """The certified part files of a table."""
    certificate = read_certificate(folder)
    for entry in certificate.files if certificate else ():
        if is_shard(entry.path):
            yield open_part(join(absolute(folder), entry.path))


def read_columns(folder: str, columns: list[str]) -> pa.Table:
    """The columns of a table's parts; above `MAX_ROWS` an even sample of row groups."""
    files = list(table_files(folder))
    groups = [(file, i) for file in files for i in range(file.num_row_groups)]
    total = sum(file.metadata.num_rows for file in files)
    step = max(1, -(-total // MAX_ROWS))
    parts = [file.read_row_group(i, columns=columns) for file, i in groups[::step]]
    if not parts:
        return pa.table({name.partition(".")[0]: pa.nulls(0) for name in columns})
    return pa.concat_tables(parts)


def spread(total: int, count: int) -> list[int]:
    """`count` row numbers spread evenly over `total`; ids are hashes, so this is a fair sample."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
