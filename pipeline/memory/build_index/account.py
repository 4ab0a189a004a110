"""Checks a build's account: every clip in or out by reason, one model, not too many failures."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.certificate import Certificate
from infra.errors import DataError
from infra.storage import join, write_bytes
from pipeline.job import refuse_failures
from pipeline.journal import Receipt
from pipeline.memory.build_index.preflight import JOB, BuildIndexConfig, Tables
from pipeline.memory.duplicates import Duplicates
from pipeline.memory.store import version_tag
from pipeline.schema import REJECTED, Status


def account(
    config: BuildIndexConfig,
    table: Any,
    receipts: list[Receipt],
    new: Tables,
    base: Certificate | None,
    facts: dict[str, Any],
    duplicates: Duplicates,
) -> Certificate:
    """Counts of the whole memory: earlier builds' and this one's."""
    rows = table.count_rows()
    fates = sum((Counter(receipt["fates"]) for receipt in receipts), Counter())
    dropped = Counter(duplicates.counts if config.dedup.mode == "drop" else {})
    staged = sum(receipt["documents"] for receipt in receipts) + (base.num_out if base else 0)
    # Documents that two units staged: the upsert took the first.
    fates[Status.FILTERED_DUPLICATE.value] += staged - rows - dropped.total()
    fates += dropped
    before = Counter(base.filtered) + Counter(base.dead) if base else Counter()
    counts = {name: count for name, count in sorted((fates + before).items()) if count}
    inputs = list(base.inputs.values()) if base else []
    inputs += [certificate.content_hash() for _, certificate in new]
    tag = version_tag(table, facts["model_hash"])
    versions = [*(base.facts["versions"] if base else []), tag]
    return Certificate(
        job=JOB,
        config_hash=config.hash(),
        num_in=sum(receipt["rows"] for receipt in receipts) + (base.num_in if base else 0),
        num_out=rows,
        filtered={n: c for n, c in counts.items() if Status(n).is_filtered},
        dead={n: c for n, c in counts.items() if Status(n).is_dead},
        inputs={f"clips-{i}": digest for i, digest in enumerate(inputs)},
        facts=facts
        | {
            "memory_version": tag,
            "versions": list(dict.fromkeys(versions)),
            "duplicates": duplicates.counts
            | {"dropped": config.dedup.mode == "drop", "min_cosine": duplicates.min_cosine},
            "highlights": _highlights(rows, tag, facts["indexes"], duplicates),
        },
    )


def carried(base: Certificate | None, indexes: dict[str, Any]) -> dict[str, Any]:
    """Facts of the indexes, and of the other CLIPs' columns, which stay as they are when a memory grows."""
    if base is None or "clips" not in base.facts:
        return {"indexes": indexes}
    return {"indexes": base.facts["indexes"] | indexes, "clips": base.facts["clips"]}


def one_model(receipts: list[Receipt], base: Certificate | None, out: str) -> dict[str, Any]:
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


def check_failures(receipts: list[Receipt], config: BuildIndexConfig) -> None:
    """Raise TooManyFailuresError if too many of the clips that the crawl found good can't be embedded."""
    rejected = [dict(zip(REJECTED.names, row, strict=True)) for r in receipts for row in r["rejected"]]
    counts = Counter(row["status"] for row in rejected)
    counts[Status.OK] = sum(receipt["rows_ok"] for receipt in receipts) - counts.total()
    what = "good clips could not be embedded"
    refuse_failures(counts, config.max_failed_frac, what=what, rejected=rejected)


def volume(receipts: list[Receipt]) -> dict[str, Any]:
    return {
        "rows": sum(receipt["rows"] for receipt in receipts),
        "documents": sum(receipt["documents"] for receipt in receipts),
    }


def write_rejected(
    out: str, receipts: list[Receipt], certificate: Certificate, dropped: Duplicates | None
) -> None:
    """The clips that this build could not use, with the reason; one file a build."""
    rows = [rejected for receipt in receipts for rejected in receipt["rejected"]]
    if dropped is not None:
        rows += [
            [row["doc_id"], None, row["reason"], f"{row['cosine']:.3f} to {row['kept']}"]
            for row in dropped.table.to_pylist()
        ]
    columns = list(zip(*rows, strict=True)) or [()] * len(REJECTED)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, REJECTED, strict=True)]
    name = f"rejected-{len(certificate.facts['versions']):03d}.parquet"
    write_table(join(out, name), pa.Table.from_arrays(arrays, schema=REJECTED))


def write_table(uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes(uri, sink.getvalue().to_pybytes())


def _highlights(rows: int, tag: str, indexes: dict[str, Any], duplicates: Duplicates) -> dict[str, str]:
    """What the terminal says of the memory, in one line."""
    found = {"documents": f"{rows:,}", "version": tag}
    if indexes:
        lows = [v["recall_lower_95"] for i in indexes.values() for v in i["by_query"].values()]
        kinds = sorted({index["setting"]["kind"] for index in indexes.values()})
        found |= {"index": f"bm25 + {'/'.join(kinds)}", "recall@k at least": f"{min(lows):.3f}"}
    if len(duplicates.table):
        found["duplicates"] = f"{len(duplicates.table):,}"
    return found
