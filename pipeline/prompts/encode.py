"""Prompts -> encodings, exactly once: a row group in, one file and a receipt out, the certificate last.

    certified prompts --row groups--> workers: the caller's encoder --> part-00003-0002.parquet, ... certificate

Every row of prompts has its row of encodings, in the same place; one that could not be encoded says why. This
floor knows no model: the encoder comes from the caller (`cli.encode` takes it from the trainer's floor), rows
of PROMPTS in, as many rows of ENCODINGS out.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from pydantic import Field

from infra.certificate import Certificate, FileEntry
from infra.config import Incidental, Location
from infra.errors import ConfigError, DataError
from infra.storage import join
from pipeline.job import NetworkJobConfig, count_fates, output_hash, refuse_failures, run_job, run_networks
from pipeline.journal import Receipt, Receipts, Unit
from pipeline.schema import ENCODINGS, Status
from pipeline.shards import ShardSet, write_shard

JOB = "encode"
Row = dict[str, Any]


class EncodeJobConfig(NetworkJobConfig):
    """Where encodings go, and who makes them; what is encoded, and by what, the trainer's config says."""

    prompts: Incidental[Location]
    """Folder or URI of certified prompt shards."""
    max_failed_frac: Incidental[float] = Field(default=0.1, ge=0, le=1)
    """The job fails when more than this share of the rows can't be encoded. Ours."""


class Encoder(Protocol):
    """What a worker needs: made once, called for each row group."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the encodings are, as JSON; must be the same in every worker."""
        ...

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Rows of PROMPTS to as many rows of ENCODINGS, in their order."""
        ...


MakeEncoder = Callable[[], Encoder]


def check(config: EncodeJobConfig) -> ShardSet:
    """Refuse before Ray starts what can't work.

    Raises:
        ConfigError: no certified prompts there, or none in them.
    """
    shards = ShardSet(config.prompts)
    if shards.num_rows == 0:
        raise ConfigError(f"{config.prompts} holds no prompts", cure="see its rejected.parquet for the reasons")
    return shards


def run(config: EncodeJobConfig, make_encoder: MakeEncoder, *, facts: dict[str, Any]) -> Certificate:
    """Encode all rows; the same command starts and resumes.

    Args:
        config: what, where to and by whom.
        make_encoder: picklable; called once in each worker.
        facts: kept in the certificate, beside the encoder's own.

    Raises:
        ConfigError: see `check`.
        TooManyFailuresError: more rows failed than `max_failed_frac` allows.
        DataError: workers whose encoders differ.
    """
    shards = check(config)
    inputs = {"prompts": shards.certificate.content_hash()}
    units = list(plan_units(shards))
    worker = partial(Worker, make_encoder, shards.uri, config.out)
    return run_job(
        JOB,
        config,
        inputs,
        work=partial(run_networks, config, units, worker, what=JOB),
        finish=partial(_finish, config, inputs, units, facts),
    )


def plan_units(shards: ShardSet) -> Iterator[Unit]:
    """One unit, and one file, for each row group of the prompts."""
    for number, group in enumerate(shards.row_groups):
        name = f"{group.file.removesuffix('.parquet')}-{group.row_group:04d}.parquet"
        yield Unit(name, {"name": name, "row_group": number})


class Worker:
    """Encodes row groups with one encoder, and writes each as a file of its own."""

    def __init__(self, make_encoder: MakeEncoder, prompts: str, out: str) -> None:
        self.encoder, self.shards, self.out = make_encoder(), ShardSet(prompts), out

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        rows = self.shards.read_row_group(payload["row_group"]).to_pylist()
        made = self.encoder(rows)
        if [row["prompt_id"] for row in made] != [row["prompt_id"] for row in rows]:
            raise DataError(f"{payload['name']}: the encoder's rows are not those of the prompts")
        # A row is a row group: the trainer picks rows out of many files, and reads no more than it needs.
        entry = write_shard(join(self.out, payload["name"]), made, ENCODINGS, row_group_rows=1)
        counts = Counter(row["status"] for row in made)
        failed = {status: n for status, n in counts.items() if status != Status.OK}
        return {
            "entry": entry.model_dump(),
            "counts": dict(counts),
            "facts": self.encoder.facts,
            "notes": failed,
        }


def _finish(
    config: EncodeJobConfig,
    inputs: dict[str, str],
    units: list[Unit],
    facts: dict[str, Any],
    receipts: Receipts,
) -> Certificate:
    """Account for every row, and see that all workers had the same encoder."""
    files: list[FileEntry] = []
    counts: Counter[str] = Counter()
    encoder: dict[str, Any] = {}
    for unit, receipt in receipts.in_order(units):
        files.append(FileEntry.model_validate(receipt["entry"]))
        counts.update(receipt["counts"])
        encoder = encoder or receipt["facts"]
        if receipt["facts"] != encoder:
            raise DataError(
                f"{config.out}: {unit.id} was made by another encoder, or on another kind of device, than the "
                "first file; delete the folder and run on machines of one kind"
            )
    refuse_failures(counts, config.max_failed_frac, what="rows could not be encoded")
    size = f"{sum(file.num_bytes for file in files) / 1e6:,.1f} MB"
    return Certificate(
        job=JOB,
        config_hash=output_hash(config, inputs),
        **count_fates(counts),
        files=files,
        inputs=inputs,
        facts={
            **facts,
            "encodings": encoder,
            "highlights": {"files": f"{len(files):,}", "size": size},
        },
    )
