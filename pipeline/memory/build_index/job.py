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

from infra.certificate import Certificate
from infra.cluster import is_cluster, wants_gpus
from infra.storage import delete, exists, join, read_bytes, read_json, write_json
from pipeline.job import JobConfig, carry_out, run_units
from pipeline.journal import Receipt, Receipts, Unit
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
from pipeline.memory.build_index.preflight import BUILD, BuildIndexConfig, Tables, begin, preflight
from pipeline.memory.commit import STAGED, commit_staged, create_table, staged_rows
from pipeline.memory.duplicates import Duplicates, drop, find_duplicates
from pipeline.memory.embed.worker import Embedder, clip_units
from pipeline.memory.index import Finished, finish
from pipeline.memory.store import memory_files, tag_table
from pipeline.schema import content_id

MEASURED, DUPLICATES = "measured.json", "duplicates.parquet"
MOST_THREADS = 8
"""Of an embedding worker. Ours."""


def run(config: BuildIndexConfig) -> Certificate:
    """Embed, commit, index, verify, certify.

    Raises:
        ConfigError: refused before anything starts (see `check`).
        DataError: no documents, two models in one memory, or a recall below the declared one.
        TooManyFailuresError: more rows failed than `max_failed_frac` allows.
    """
    new, base = preflight(config)
    out = config.out
    if base is not None and not new:
        delete(join(out, BUILD))
        return base
    begin(config, new, base)
    key = content_id(config.clip.hash(), config.key_frames)
    units = list(clip_units(new, rows_per_unit=config.rows_per_unit, key=key))
    certificate = carry_out(
        config,
        work=lambda: _embed(config, units, base),
        finish=lambda receipts: _commit(config, new, base, [r for _, r in receipts.in_order(units)]),
    )
    delete(join(out, BUILD))
    sample.keep_only(out, certificate.facts["memory_version"])
    return certificate


def _embed(config: BuildIndexConfig, units: list[Unit], base: Certificate | None) -> Receipts:
    """All units to staged files, by workers that suit the session that is running."""
    device, threads, resources = worker_resources(config)
    embedder = Embedder(
        clip=config.clip,
        key_frames=config.key_frames,
        staged=join(config.out, BUILD, STAGED),
        base=config.out if base else None,
        base_version=base.facts["memory_version"] if base else None,
        device=device,
        threads=threads,
    )
    started_s = time.monotonic()
    receipts = run_units(join(config.out, BUILD), units, embedder, what="embed", total=len(units), **resources)
    write_json(join(config.out, BUILD, MEASURED), {"embed_s": time.monotonic() - started_s})
    return receipts


def worker_resources(config: JobConfig) -> tuple[str, int, dict[str, Any]]:
    """(device, threads of a worker, options of `run_units`); call inside a `ray_session`.

    This machine's CPUs are shared out among one worker a GPU, or one for every 8 CPUs. Of a cluster each worker
    asks for one, as any node has it with its GPU; as many come as there is work and room for.
    """
    import ray

    num_gpus, here = float(wants_gpus(config.ray)), ray.cluster_resources()
    device, workers = "cuda" if num_gpus else "cpu", config.num_workers
    if is_cluster(config.ray):
        threads = MOST_THREADS if num_gpus else 1
        return device, threads, {"num_workers": workers, "num_gpus": num_gpus, "actors": num_gpus > 0}
    gpus, cpus = int(here.get("GPU", 0) * num_gpus), int(here.get("CPU", 1))
    workers = workers or gpus or max(1, cpus // MOST_THREADS)
    threads = max(1, min(MOST_THREADS, cpus // workers))
    # One worker on CPUs needs no actor: Ray gives it the same process, and the model in it, again.
    options = {
        "num_workers": workers,
        "num_cpus": min(threads, cpus),
        "num_gpus": num_gpus,
        "actors": workers > 1 or gpus > 0,
    }
    return device, threads, options


def _commit(
    config: BuildIndexConfig, new: Tables, base: Certificate | None, receipts: list[Receipt]
) -> Certificate:
    """Staged files -> the table, its indexes, its tag; the certificate that proves them."""
    out = config.out
    model = one_model(receipts, base, out)
    check_failures(receipts, config)
    table = create_table(out, model["dim"])
    commit_staged(table, join(out, BUILD), receipts)
    duplicates = _deduplicate(table, config, base=base, receipts=receipts)
    done = _finish(table, config, base, receipts, duplicates)
    facts = model | {"analysis": config.index.analysis} | carried(base, done.facts)
    certificate = account(config, table, receipts, new, base, facts, duplicates)
    write_rejected(out, receipts, certificate, duplicates if config.dedup.mode == "drop" else None)
    measured = read_json(join(out, BUILD, MEASURED)) | done.measured | volume(receipts)
    write_json(join(out, MEASURED), measured)
    tag = certificate.facts["memory_version"]
    sample.save(out, tag, done.samples)
    tag_table(table, tag)
    return certificate.model_copy(update={"files": memory_files(out, sample.place_of(out, tag))})


def _finish(
    table: Any,
    config: BuildIndexConfig,
    base: Certificate | None,
    receipts: list[Receipt],
    duplicates: Duplicates,
) -> Finished:
    """Index and verify; a memory that grew keeps the sample that it was verified on before."""
    if base is None:
        return finish(table, config.index)
    kept = sample.load(config.out, base)
    dropped = duplicates.table["doc_id"].to_pylist() if config.dedup.mode == "drop" else []
    growth = None
    if kept is not None:
        rows = lambda: staged_rows(join(config.out, BUILD), receipts)  # noqa: E731
        growth = sample.Growth(kept=kept, new_rows=rows, removed=frozenset(dropped))
    return finish(table, config.index, before=base.facts, growth=growth)


def _deduplicate(
    table: Any, config: BuildIndexConfig, *, base: Certificate | None, receipts: list[Receipt]
) -> Duplicates:
    """Find the duplicates, keep the list beside the memory, drop them if asked.

    The list is made once and kept in the build's folder: a build that was killed while it dropped them
    goes on with the same list.
    """
    if config.dedup.mode == "off":
        return Duplicates.none()
    place = join(config.out, BUILD, DUPLICATES)
    if exists(place):
        read = pq.read_table(pa.BufferReader(read_bytes(place)))
        found = Duplicates(read, json.loads((read.schema.metadata or {}).get(b"min_cosine", b"null")))
    else:
        new = None
        if base is not None:
            new = [i for ids, _ in staged_rows(join(config.out, BUILD), receipts) for i in ids.to_pylist()]
        found = find_duplicates(table, config.dedup, new=new, facts=base.facts if base else None)
        bound = {"min_cosine": json.dumps(found.min_cosine)}
        write_table(place, found.table.replace_schema_metadata(bound))
    write_table(join(config.out, DUPLICATES), found.table)
    if config.dedup.mode == "drop":
        drop(table, found)
    return found
