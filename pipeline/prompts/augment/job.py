"""`vimi-data augment`: captions x memory -> multimodal prompts, guarded, as shards for the trainer.

clips (certified) ── slices ──▶ search ─▶ guard ─▶ choose ─▶ one shard a slice + receipt
memory's arrays, shared          in slice order:
rejected, meta, certificate last
"""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from infra.claim import open_job
from infra.cluster import ray_session
from infra.config import canonical_json
from infra.errors import TooManyFailuresError
from infra.progress import Progress
from infra.storage import (
    Certificate,
    FileEntry,
    absolute,
    delete,
    join,
    list_files,
    write_certificate,
)
from pipeline.job import JournalWriter, Receipts, Unit, run_units
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.door import Inputs, check, needs_clip
from pipeline.prompts.augment.worker import AugmentWorker
from pipeline.schema import REJECTED, Status, TargetKind, content_id
from pipeline.shards import REJECTED_FILE, write_meta, write_shard

JOB = "augment"
PLACES = {"clips", "memory", "clip", "max_failed_frac", "timeout_s", "memory_bytes", "in_process_rows"}
"""Fields that say where or how long, not what: the inputs' content hashes stand for the places in
`config_hash`."""


def run(config: AugmentConfig) -> Certificate:
    """Make the prompts, or continue; a finished job is recognised and left alone.

    Raises:
        ConfigError: refused at the door (see `check`).
        TooManyFailuresError: more clips failed than `max_failed_frac` allows.
    """
    started_s = time.monotonic()
    config = with_absolute_paths(config)
    inputs = check(config)
    done = open_job(config.out, job=JOB, config=config, inputs=inputs.hashes, hash_exclude=PLACES)
    if done:
        return done
    config_hash = hash_of(config, inputs)
    units = list(make_units(config, inputs))
    make_worker = partial(AugmentWorker, config, config_hash)
    if is_small(config, inputs):
        receipts = run_here(config.out, units, make_worker())
    else:
        with ray_session(config.ray):
            receipts = run_units(
                config.out,
                units,
                make_worker,
                what="augment",
                total=len(units),
                num_workers=config.num_workers,
            )
    certificate = _finish(config, config_hash, inputs, units, receipts)
    certificate = certificate.model_copy(
        update={"created_at_s": time.time(), "wall_s": time.monotonic() - started_s}
    )
    write_certificate(config.out, certificate)
    receipts.clear()
    return certificate


def is_small(config: AugmentConfig, inputs: Inputs) -> bool:
    """Would starting Ray take longer than the job? Only where nothing is decoded and no CLIP is loaded."""
    rows = sum(certificate.num_out for _, certificate in inputs.clips)
    return (
        config.num_workers is None
        and rows <= config.in_process_rows
        and config.target.kind == TargetKind.REFERENCE
        and not needs_clip(config, inputs.clips, inputs.memory)
    )


def run_here(out: str, units: list[Unit], worker: AugmentWorker) -> Receipts:
    """Run the units in this process, with the same journal and the same bytes as Ray's workers."""
    receipts = Receipts(out)
    journal = JournalWriter(receipts.folder, "here")
    progress = Progress("augment", len(units), unit="units")
    for unit in units:
        if unit.id not in receipts:
            receipt = worker(unit.payload)
            journal.append(unit.id, receipt)
            progress.add(1, receipt["notes"])
    journal.close()
    progress.close()
    receipts.refresh()
    return receipts


def with_absolute_paths(config: AugmentConfig) -> AugmentConfig:
    """The same config for every process: workers run in a folder of their own."""
    guard = config.guard
    if guard.exclude is not None:
        guard = guard.model_copy(update={"exclude": absolute(guard.exclude)})
    places = {
        "out": absolute(config.out),
        "memory": absolute(config.memory),
        "clips": tuple(absolute(uri) for uri in config.clips),
        "guard": guard,
    }
    return config.model_copy(update=places)


def hash_of(config: AugmentConfig, inputs: Inputs) -> str:
    """16 hex digits: what the output depends on, and not where anything lies."""
    values = config.model_dump(mode="json", exclude={"out", "ray", "num_workers", *PLACES})
    values["guard"].pop("exclude")
    return content_id(canonical_json([values, inputs.hashes]).decode())[:16]


def make_units(config: AugmentConfig, inputs: Inputs) -> Iterator[Unit]:
    """Slices of `shard_rows` rows over all parts of all tables, one after the other."""
    pieces: list[list[Any]] = []
    size = number = 0
    for uri, certificate in inputs.clips:
        for part in (f for f in certificate.files if f.path.startswith("part-")):
            start = 0
            while start < part.rows:
                rows = min(config.shard_rows - size, part.rows - start)
                pieces.append([join(uri, part.path), start, rows])
                start, size = start + rows, size + rows
                if size == config.shard_rows:
                    yield _unit(number, pieces)
                    pieces, size, number = [], 0, number + 1
    if pieces:
        yield _unit(number, pieces)


def _unit(number: int, pieces: list[list[Any]]) -> Unit:
    return Unit(id=f"shard-{number:05d}", payload={"number": number, "pieces": pieces})


def _finish(
    config: AugmentConfig, config_hash: str, inputs: Inputs, units: list[Unit], receipts: Receipts
) -> Certificate:
    """Gather the receipts in order; write the tables beside the shards; make the certificate."""
    found = [receipt for _, receipt in receipts.in_order(units)]
    rejected = [row for receipt in found for row in receipt["rejected"]]
    fates = Counter(status for _, _, status, _ in rejected)
    num_in = sum(receipt["num_in"] for receipt in found)
    dead = {name: count for name, count in sorted(fates.items()) if Status(name).is_dead}
    if sum(dead.values()) > config.max_failed_frac * num_in:
        first = next(row for row in rejected if Status(row[2]).is_dead)
        raise TooManyFailuresError(
            f"{sum(dead.values())} of {num_in} clips could not become prompts, more than "
            f"max_failed_frac={config.max_failed_frac} allows; the first: {first[1]}: {first[2]} "
            f"({first[3]})"
        )
    shards = [FileEntry.model_validate(r["file"]) for r in found if r["file"]]
    columns = list(zip(*rejected, strict=True)) or [()] * len(REJECTED)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, REJECTED, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=REJECTED)
    files = [
        *shards,
        write_shard(join(config.out, REJECTED_FILE), table, REJECTED, row_group_rows=1 << 16),
        write_meta(config.out, shards, row_group_rows=config.row_group_rows),
    ]
    _delete_torn(config.out)
    documents = sum((Counter(receipt["documents"]) for receipt in found), Counter())
    return Certificate(
        job=JOB,
        config_hash=config_hash,
        num_in=num_in,
        num_out=sum(shard.rows for shard in shards),
        filtered={n: c for n, c in sorted(fates.items()) if Status(n).is_filtered},
        dead=dead,
        files=files,
        inputs=inputs.hashes,
        facts={
            "memory_version": inputs.memory.version,
            "model_hash": inputs.memory.model_hash,
            "retriever": config.retrieve.retriever,
            "k": config.retrieve.k,
            "max_similarity": next((r["max_similarity"] for r in found if r["max_similarity"]), None),
            "num_documents": dict(sorted(documents.items(), key=lambda item: int(item[0]))),
            "fewer_than_k": sum(c for n, c in documents.items() if int(n) < config.retrieve.k),
            "refused": dict(sorted(sum((Counter(r["refused"]) for r in found), Counter()).items())),
        },
    )


def _delete_torn(out: str) -> None:
    """Half-written files that a kill left beside their names."""
    for file in list_files(out, recursive=False):
        if file.rpartition("/")[2].startswith(".part-"):
            delete(file)
