"""Prompts -> encodings, exactly once: a row group in, one file and a receipt out, the certificate last.

    certified prompts --row groups--> workers: the caller's encoder --> part-00003-0002.parquet, ... certificate

Every row of prompts has its row of encodings, in the same place; one that could not be encoded says why. The
encoder comes from the caller (`cli.encode` takes it from the trainer's floor): rows of PROMPTS in, as many rows
of ENCODINGS out.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from infra.claim import open_job
from infra.cluster import ray_session
from infra.errors import ConfigError, DataError, TooManyFailuresError
from infra.storage import Certificate, FileEntry, join, write_certificate
from pipeline.job import Receipt, Receipts, Unit, run_units
from pipeline.prompts.encode.config import EncodeJobConfig
from pipeline.schema import ENCODINGS, Status
from pipeline.shards import ShardSet, write_shard

JOB = "encode"
Row = dict[str, Any]


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
    """Refuse at the door what can't work; starts nothing.

    Raises:
        ConfigError: no certified prompts there, or none in them.
    """
    shards = ShardSet(config.prompts)
    if shards.num_rows == 0:
        raise ConfigError(f"{config.prompts} holds no prompts", cure="see its rejected.parquet for the reasons")
    return shards


def run(
    config: EncodeJobConfig, make_encoder: MakeEncoder, *, facts: dict[str, Any], hash_exclude: set[str]
) -> Certificate:
    """Encode all rows; the same command starts and resumes.

    Args:
        config: with absolute paths.
        make_encoder: picklable; called once in each worker.
        facts: kept in the certificate, beside the encoder's own.
        hash_exclude: further fields of the config that can't change the output.

    Raises:
        ConfigError: see `check`.
        TooManyFailuresError: more rows failed than `max_failed_frac` allows.
        DataError: workers whose encoders differ.
    """
    shards, started_s = check(config), time.time()
    inputs = {"prompts": shards.certificate.content_hash()}
    exclude = {"num_gpus", *hash_exclude}
    done = open_job(config.out, job=JOB, config=config, inputs=inputs, hash_exclude=exclude)
    if done is not None:
        return done
    units = list(plan_units(shards))
    with ray_session(config.ray):
        receipts = run_units(
            config.out,
            units,
            partial(Worker, make_encoder, shards.uri, config.out),
            what=JOB,
            total=len(units),
            num_workers=config.num_workers or (_gpu_workers(config) if config.num_gpus else None),
            num_gpus=config.num_gpus,
            actors=config.num_gpus > 0,
        )
    files, counts, encoder = _account(receipts, units, config)
    certificate = Certificate(
        job=JOB,
        config_hash=config.hash(exclude={"out", "ray", "num_workers", "prompts", *exclude}),
        num_in=counts.total(),
        num_out=counts[Status.OK],
        dead={s.value: n for s, n in sorted(counts.items()) if s is not Status.OK},
        files=files,
        inputs=inputs,
        facts={
            **facts,
            "encodings": encoder,
            "highlights": {"files": f"{len(files):,}", "size": _size(files)},
        },
        created_at_s=time.time(),
        wall_s=time.time() - started_s,
    )
    write_certificate(config.out, certificate)
    receipts.clear()
    return certificate


def plan_units(shards: ShardSet) -> Iterator[Unit]:
    """One unit, and one file, for each row group of the prompts."""
    for number, group in enumerate(shards.row_groups):
        name = f"{group.file.removesuffix('.parquet')}-{group.row_group:04d}.parquet"
        yield Unit(name, {"name": name, "row_group": number})


def _gpu_workers(config: EncodeJobConfig) -> int:
    """As many workers as the session's GPUs serve."""
    import ray

    return max(1, int(ray.cluster_resources().get("GPU", 0) / config.num_gpus))


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


def _account(
    receipts: Receipts, units: list[Unit], config: EncodeJobConfig
) -> tuple[list[FileEntry], Counter[Status], dict[str, Any]]:
    """Files in order, rows by status, and the facts that all workers agree on."""
    files: list[FileEntry] = []
    counts: Counter[Status] = Counter()
    facts: dict[str, Any] = {}
    for unit, receipt in receipts.in_order(units):
        files.append(FileEntry.model_validate(receipt["entry"]))
        counts.update({Status(name): n for name, n in receipt["counts"].items()})
        facts = facts or receipt["facts"]
        if receipt["facts"] != facts:
            raise DataError(
                f"{config.out}: {unit.id} was made by another encoder, or on another kind of device, than the "
                "first file; delete the folder and run on machines of one kind"
            )
    dead = counts.total() - counts[Status.OK]
    if dead > config.max_failed_frac * counts.total():
        by_status = {status.value: n for status, n in counts.items() if status is not Status.OK}
        raise TooManyFailuresError(
            f"{dead:,} of {counts.total():,} rows could not be encoded, max_failed_frac is "
            f"{config.max_failed_frac}; by status: {by_status}"
        )
    return files, counts, facts


def _size(files: list[FileEntry]) -> str:
    return f"{sum(file.num_bytes for file in files) / 1e6:,.1f} MB"
