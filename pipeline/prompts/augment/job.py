"""`vimi-data augment`: captions x memory -> multimodal prompts, guarded, as shards for the trainer.

clips (certified) ── slices ──▶ search ─▶ guard ─▶ choose ─▶ one shard a slice + receipt
memory's arrays, shared          in slice order:
rejected, meta, certificate last
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from infra.storage import Certificate, FileEntry, join
from pipeline.job import (
    Receipts,
    Unit,
    count_fates,
    output_hash,
    refuse_failures,
    run_job,
    run_units,
)
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.preflight import Inputs, check
from pipeline.prompts.augment.worker import AugmentWorker
from pipeline.schema import Status
from pipeline.shards import write_meta, write_rejected

JOB = "augment"


def run(config: AugmentConfig) -> Certificate:
    """Make the prompts, or continue; a finished job is recognised and left alone.

    Raises:
        ConfigError: refused before Ray starts (see `check`).
        TooManyFailuresError: more clips failed than `max_failed_frac` allows.
    """
    inputs = check(config)
    units = list(make_units(config, inputs))
    worker = partial(AugmentWorker, config, output_hash(config, inputs.hashes))
    work = partial(
        run_units, config.out, units, worker, what=JOB, total=len(units), num_workers=config.num_workers
    )
    finish = partial(_finish, config, inputs, units)
    return run_job(JOB, config, inputs.hashes, work=work, finish=finish)


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


def _finish(config: AugmentConfig, inputs: Inputs, units: list[Unit], receipts: Receipts) -> Certificate:
    """Gather the receipts in order; write the tables beside the shards; make the certificate."""
    found = [receipt for _, receipt in receipts.in_order(units)]
    rejected = [row for receipt in found for row in receipt["rejected"]]
    shards = [FileEntry.model_validate(r["file"]) for r in found if r["file"]]
    counts = Counter[str](row["status"] for row in rejected)
    counts[Status.OK] = sum(s.rows for s in shards)
    what = "clips could not become prompts"
    refuse_failures(counts, config.max_failed_frac, what=what, rejected=rejected)
    files = [
        *shards,
        write_rejected(config.out, rejected),
        write_meta(config.out, shards, row_group_rows=config.row_group_rows),
    ]
    documents = sum((Counter(receipt["documents"]) for receipt in found), Counter())
    return Certificate(
        job=JOB,
        config_hash=output_hash(config, inputs.hashes),
        **count_fates(counts),
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
