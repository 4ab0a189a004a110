"""Checks a build's account: every clip in or out by reason, one model, not too many failures."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.certificate import Certificate
from infra.errors import DataError
from infra.storage import join, write_bytes
from pipeline.job import refuse_failures
from pipeline.journal import Receipt
from pipeline.memory.build_index.duplicates import Duplicates
from pipeline.memory.build_index.preflight import JOB, BuildIndexConfig, Tables
from pipeline.schema import REJECTED, Status


def account(
    config: BuildIndexConfig,
    receipts: Sequence[Receipt],
    new: Tables,
    base: Certificate | None,
    facts: dict[str, Any],
    duplicates: Duplicates,
) -> Certificate:
    """Counts of the whole memory: earlier builds' and this one's."""
    fates = sum((Counter(receipt["fates"]) for receipt in receipts), Counter())
    dropped = Counter(duplicates.counts if config.dedup.mode == "drop" else {})
    rows = sum(shard["rows"] for shard in facts["shards"])
    fates[Status.FILTERED_DUPLICATE.value] += len(duplicates.copies)
    before = Counter(base.filtered) + Counter(base.dead) if base else Counter()
    counts = {name: count for name, count in sorted((fates + dropped + before).items()) if count}
    inputs = list(base.inputs.values()) if base else []
    inputs += [certificate.content_hash() for _, certificate in new]
    highlights = {"documents": f"{rows:,}", "version": facts["memory_version"]} | told_of(facts["indexes"])
    if len(duplicates.table):
        highlights["duplicates"] = f"{len(duplicates.table):,}"
    return Certificate(
        job=JOB,
        config_hash=config.hash(),
        num_in=sum(receipt["rows"] for receipt in receipts) + (base.num_in if base else 0),
        num_out=rows,
        filtered={n: c for n, c in counts.items() if Status(n).is_filtered},
        dead={n: c for n, c in counts.items() if Status(n).is_dead},
        inputs={f"clips-{i}": digest for i, digest in enumerate(inputs)},
        facts=facts | {"highlights": highlights},
    )


def told_of(indexes: dict[str, Any]) -> dict[str, str]:
    """What the closing lines tell of the indexes."""
    return {"recall of the index": f"{min(i['recall'] for i in indexes.values()):.3f}"} if indexes else {}


def one_model(receipts: Sequence[Receipt], base: Certificate | None, out: str) -> dict[str, Any]:
    """Identity of the CLIP that all workers used.

    Raises:
        DataError: there is no document, or vectors of two models.
    """
    if not base and not any(receipt["documents"] for receipt in receipts):
        counts = dict(sum((Counter(r["fates"]) for r in receipts), Counter()))
        raise DataError(f"no clip became a document: {counts or 'the tables are empty'}")
    names = ("model", "model_hash", "dim")
    models = [{name: receipt[name] for name in names} for receipt in receipts]
    models += [{name: base.facts[name] for name in names}] if base else []
    hashes = sorted({model["model_hash"] for model in models})
    if len(hashes) > 1:
        raise DataError(
            f"{out} would mix vectors of {len(hashes)} models ({', '.join(hashes)}): weights changed"
        )
    return models[0]


def check_failures(receipts: Sequence[Receipt], config: BuildIndexConfig) -> None:
    """Raise TooManyFailuresError if too many of the clips that the crawl found good can't be embedded."""
    rejected = [dict(zip(REJECTED.names, row, strict=True)) for r in receipts for row in r["rejected"]]
    counts = Counter(row["status"] for row in rejected)
    counts[Status.OK] = sum(receipt["rows"] for receipt in receipts) - counts.total()
    what = "good clips could not be embedded"
    refuse_failures(counts, config.max_failed_frac, what=what, rejected=rejected)


def write_rejected(out: str, number: int, receipts: Sequence[Receipt], dropped: Duplicates | None) -> None:
    """The clips that build `number` could not use, with the reason."""
    rows = [rejected for receipt in receipts for rejected in receipt["rejected"]]
    if dropped is not None:
        rows += [
            [row["doc_id"], None, row["reason"], f"{row['cosine']:.3f} to {row['kept']}"]
            for row in dropped.table.to_pylist()
        ]
    columns = list(zip(*rows, strict=True)) or [()] * len(REJECTED)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, REJECTED, strict=True)]
    write_parquet(join(out, f"rejected-{number:03d}.parquet"), pa.Table.from_arrays(arrays, schema=REJECTED))


def write_parquet(uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(uri, sink.getvalue().to_pybytes())
