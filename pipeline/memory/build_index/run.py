"""`vimi-data build-index`: clips tables -> the retrieval memory, embedded, indexed, certified.

    clips (certified) ── slices ──▶ CLIP workers ──▶ staged Arrow files + receipts
                                          one committer, in unit order ──▶ LanceDB
                          compact, BM25 index, vector indexes held to their recall, tag, certificate

Killed at any moment, the same command ends in the same table. A finished memory grows: the same command
with more tables and `grow` adds the documents that are new.
"""

import json
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.cluster import ray_session
from infra.storage import (
    Certificate,
    absolute,
    delete,
    exists,
    join,
    read_bytes,
    write_certificate,
    write_json,
)
from pipeline.job import Receipt, run_units
from pipeline.memory import sample
from pipeline.memory.build_index.account import (
    account,
    carried,
    check_failures,
    one_model,
    volume,
    write_rejected,
    write_table,
)
from pipeline.memory.build_index.config import BUILD, DUPLICATES, MEASURED, BuildIndexConfig
from pipeline.memory.build_index.door import begin, door, is_in
from pipeline.memory.build_index.resources import worker_resources
from pipeline.memory.commit import STAGED, commit_staged, create_table, staged_rows
from pipeline.memory.dedup import Duplicates, drop, find_duplicates
from pipeline.memory.embed import Embedder, clip_units
from pipeline.memory.finish import Finished, finish
from pipeline.memory.store import tag_table


def run(config: BuildIndexConfig) -> Certificate:
    """Embed, commit, index, verify, certify.

    Raises:
        ConfigError: refused at the door (see `check`).
        DataError: no documents, two models in one memory, or a recall below the declared one.
        TooManyFailuresError: more rows failed than `max_failed_frac` allows.
    """
    started_s = time.monotonic()
    tables, base = door(config)
    out = absolute(config.out)
    new = [(uri, table) for uri, table in tables if not is_in(base, table)]
    if base is not None and not new:
        delete(join(out, BUILD))
        return base
    begin(out, new, base)
    units = list(clip_units(new, rows_per_unit=config.rows_per_unit, key=_unit_key(config)))
    with ray_session(config.ray):
        embedder, resources = _embedder(config, out, base)
        receipts = run_units(join(out, BUILD), units, embedder, what="embed", total=len(units), **resources)
    measured: dict[str, Any] = {"embed_s": time.monotonic() - started_s}
    ordered = [receipt for _, receipt in receipts.in_order(units)]
    model = one_model(ordered, base, out)
    check_failures(ordered, config)
    table = create_table(out, model["dim"])
    commit_staged(table, join(out, BUILD), ordered)
    duplicates = _deduplicate(table, config, out, base=base, receipts=ordered)
    done = _finish(table, config, out, base, ordered, duplicates)
    facts = model | carried(base, done.facts)
    certificate = account(config, table, ordered, new, base, facts, duplicates)
    write_rejected(out, ordered, certificate, duplicates if config.dedup.mode == "drop" else None)
    write_json(join(out, MEASURED), measured | done.measured | volume(ordered))
    tag = certificate.facts["memory_version"]
    sample.save(out, tag, done.samples)
    tag_table(table, tag)
    certificate = certificate.model_copy(
        update={"created_at_s": time.time(), "wall_s": time.monotonic() - started_s}
    )
    write_certificate(out, certificate)
    delete(join(out, BUILD))
    sample.keep_only(out, tag)
    return certificate


def _unit_key(config: BuildIndexConfig) -> str:
    return config.hash(exclude=set(BuildIndexConfig.model_fields) - {"clip", "embed"})


def _embedder(config: BuildIndexConfig, out: str, base: Certificate | None) -> tuple[Embedder, dict[str, Any]]:
    """The worker, and what it needs of the session that is running."""
    device, threads, resources = worker_resources(config.num_workers, config.threads)
    embedder = Embedder(
        clip=config.clip,
        embed=config.embed,
        staged=join(out, BUILD, STAGED),
        base=out if base else None,
        base_version=base.facts["memory_version"] if base else None,
        device=device,
        threads=threads,
    )
    return embedder, resources


def _finish(
    table: Any,
    config: BuildIndexConfig,
    out: str,
    base: Certificate | None,
    receipts: list[Receipt],
    duplicates: Duplicates,
) -> Finished:
    """Index and verify; a memory that grew keeps the sample that it was verified on before."""
    if base is None:
        return finish(table, config.index, seed=config.seed)
    kept = sample.load(out, base.facts["memory_version"])
    dropped = duplicates.table["doc_id"].to_pylist() if config.dedup.mode == "drop" else []
    growth = None
    if kept is not None:
        rows = lambda: staged_rows(join(out, BUILD), receipts)  # noqa: E731
        growth = sample.Growth(kept=kept, new_rows=rows, removed=frozenset(dropped))
    return finish(table, config.index, seed=config.seed, before=base.facts, growth=growth)


def _deduplicate(
    table: Any, config: BuildIndexConfig, out: str, *, base: Certificate | None, receipts: list[Receipt]
) -> Duplicates:
    """Find the duplicates, keep the list beside the memory, drop them if asked.

    The list is made once and kept in the build's folder: a build that was killed while it dropped them
    goes on with the same list.
    """
    if config.dedup.mode == "off":
        return Duplicates.none()
    place = join(out, BUILD, DUPLICATES)
    if exists(place):
        read = pq.read_table(pa.BufferReader(read_bytes(place)))
        found = Duplicates(read, json.loads((read.schema.metadata or {}).get(b"min_cosine", b"null")))
    else:
        new = None
        if base is not None:
            new = [i for ids, _ in staged_rows(join(out, BUILD), receipts) for i in ids.to_pylist()]
        found = find_duplicates(table, config.dedup, new=new, facts=base.facts if base else None)
        bound = {"min_cosine": json.dumps(found.min_cosine)}
        write_table(place, found.table.replace_schema_metadata(bound))
    write_table(join(out, DUPLICATES), found.table)
    if config.dedup.mode == "drop":
        drop(table, found)
    return found
