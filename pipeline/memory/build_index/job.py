"""`vimi-data build-index`: clips tables -> the retrieval memory, embedded, in shards, certified.

    clips (certified) ── slices ──▶ CLIP workers ──▶ staged Arrow files + receipts
    staged files ── groups ──▶ keys ──▶ pairs of duplicates          (workers)
    staged files ── groups ──▶ fragments and arrays of a shard       (workers)
    one commit of metadata, BM25's statistics, tag                   (driver)
    shards ──▶ segments of the indexes for search, their recall      (workers)
    commits of metadata, certificate                                 (driver)

Killed at any moment, the same command ends in the same memory. A finished memory grows: the same command with
more tables and `grow` adds shards of the documents that are new; nothing that is there is written again. With
another `index` it gets what its indexes lack, and stays the same version: prompts don't depend on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from infra.certificate import Certificate
from infra.cluster import is_cluster, wants_gpus
from infra.storage import delete, join, write_bytes
from pipeline.job import JobConfig, carry_out, run_units
from pipeline.journal import Receipt, Receipts, Unit
from pipeline.memory.build_index.account import (
    account,
    check_failures,
    one_model,
    told_of,
    write_parquet,
    write_rejected,
)
from pipeline.memory.build_index.duplicates import (
    PAIRS,
    Documents,
    Duplicates,
    KeyWriter,
    PairFinder,
    calibrate,
    group,
    key_units,
    num_bands,
    pair_units,
)
from pipeline.memory.build_index.index import build_indexes, is_held
from pipeline.memory.build_index.preflight import BUILD, BuildIndexConfig, Tables, begin, preflight
from pipeline.memory.build_index.publish import own_files, publish, smallest, tag_latest
from pipeline.memory.build_index.shards import DROPPED, STAGED, Group, ShardWriter, commit, create_table, deal
from pipeline.memory.embed.worker import Embedder, clip_units
from pipeline.memory.store import Shard, lance_dataset, read_table, version_tag
from pipeline.schema import content_id

MOST_THREADS = 8
"""Of an embedding worker. Ours."""


def run(config: BuildIndexConfig) -> Certificate:
    """Embed, find duplicates, write shards, commit, index, certify.

    Raises:
        ConfigError: refused before anything starts (see `check`).
        DataError: no documents, two models in one memory, or a recall below the declared floor.
        TooManyFailuresError: more rows failed than `max_failed_frac` allows.
    """
    new, base = preflight(config)
    if base is not None and not new and is_held(base.facts["indexes"], config.index, base.num_out):
        delete(join(config.out, BUILD))
        return base
    begin(config, new, base)
    build = Build(config, new, base)
    if base is not None and not new:
        certificate = carry_out(config, work=partial(build.index, base), finish=partial(build.indexed, base))
    else:
        certificate = carry_out(config, work=build.work, finish=build.finish)
    delete(join(config.out, BUILD))
    return certificate


class Build:
    """One build: what it adds to which memory."""

    def __init__(self, config: BuildIndexConfig, new: Tables, base: Certificate | None) -> None:
        self.config, self.new, self.base = config, new, base
        self.out, self.folder = config.out, join(config.out, BUILD)
        self.old = [Shard(**shard) for shard in base.facts["shards"]] if base else []
        self.base_version = str(base.facts["memory_version"]) if base else None
        key = content_id(config.clip.hash(), config.key_frames)
        self.near: dict[str, Any] = {}
        self.units = list(clip_units(new, rows_per_unit=config.rows_per_unit, key=key))

    def work(self) -> Receipts:
        """All that workers do; call inside a `ray_session`."""
        self.embedded = self._run("embed", self.units, *self._embedder())
        self.model = one_model(self.embedded, self.base, self.out)
        check_failures(self.embedded, self.config)
        create_table(self.out, self.model["dim"])
        old = sum(shard.rows for shard in self.old)
        groups = deal(self.embedded, self.config.shard_rows, shards=len(self.old), documents=old)
        self.duplicates = self._find_duplicates(groups, old)
        writer = partial(ShardWriter, self.out, self.folder, self.model["dim"], self.config.analysis)
        written = self._run("write shards", [group.unit("shard") for group in groups], writer)
        self.facts = self._commit([receipt for receipt in written if receipt["rows"]])
        return Receipts(self.folder)

    def _run(self, what: str, units: Sequence[Unit], worker: Any, options: Any = None) -> list[Receipt]:
        options = options or {"num_workers": self.config.num_workers}
        receipts = run_units(self.folder, units, worker, what=what, total=len(units), **options)
        return [receipt for _, receipt in receipts.in_order(units)]

    def _embedder(self) -> tuple[Callable[[], Any], dict[str, Any]]:
        device, threads, options = worker_resources(self.config)
        embedder = Embedder(
            clip=self.config.clip,
            key_frames=self.config.key_frames,
            staged=join(self.folder, STAGED),
            base=self.out if self.base else None,
            base_version=self.base_version,
            device=device,
            threads=threads,
        )
        return embedder, options

    def _find_duplicates(self, groups: Sequence[Group], old: int) -> Duplicates:
        """Repeated ids always; exact and near duplicates if asked; what is dropped is noted for the writers."""
        config, partitions = self.config.dedup, max(len(groups) + len(self.old), 1)
        near = config.mode != "off"
        tables: list[pa.Table] = []
        if groups:
            documents = Documents(self.out, self.folder, self.base_version, old)
            documents.write(groups)
            bands = num_bands(old + sum(group.rows for group in groups), config.max_phash_bits) if near else 0
            writer = partial(KeyWriter, self.out, self.folder, bands, partitions)
            keys = self._run("keys of duplicates", key_units(groups, self.old), writer)
            bound = calibrate(config, documents, keys)
            finder = partial(PairFinder, documents, bands, config.max_phash_bits, bound, near)
            found = self._run("duplicates", list(pair_units(keys, partitions)), finder)
            tables = [read_table(join(self.folder, PAIRS, r["file"])) for r in found if r["file"]]
            self.near = (
                {"min_cosine": bound, "certain_bits": min(bands - 1, config.max_phash_bits)} if near else {}
            )
        duplicates = group(tables, old)
        places = [duplicates.copies, *([duplicates.places] if config.mode == "drop" else [])]
        write_bytes(join(self.folder, DROPPED), np.unique(np.concatenate(places)).tobytes())
        return duplicates

    def _commit(self, written: Sequence[Receipt]) -> dict[str, Any]:
        """Make the written shards a version of the memory, indexed and tagged; facts of its certificate."""
        base = self.base.facts if self.base else {"versions": [], "ids_sum": "0", "indexes": {}}
        first = sum(shard.rows for shard in self.old)
        rows = first + sum(receipt["rows"] for receipt in written)
        ids_sum = int(base["ids_sum"], 16) + sum(int(receipt["ids_sum"], 16) for receipt in written)
        config = self.config
        tag = version_tag(self.model["model_hash"], config.analysis, config.key_frames, rows, ids_sum)
        new = commit(self.out, written, first=first, version=tag)
        facts = self.model | {
            "analysis": self.config.analysis,
            "memory_version": tag,
            "versions": list(dict.fromkeys([*base["versions"], tag])),
            "ids_sum": f"{ids_sum:x}",
            "shards": [asdict(shard) for shard in [*self.old, *new]],
            "indexes": base["indexes"],
            "duplicates": self.duplicates.counts | self.near | {"dropped": self.config.dedup.mode == "drop"},
        }
        if tag != self.base_version:
            publish(self.out, facts, smallest(written, first))
            facts["indexes"] = build_indexes(self.out, self.folder, facts, self.config.index, self._run)
            tag_latest(self.out, tag)  # with its indexes
        return facts

    def index(self, base: Certificate) -> Receipts:
        """Give a finished memory what its indexes lack; call inside a `ray_session`."""
        added = build_indexes(self.out, self.folder, base.facts, self.config.index, self._run)
        # A tag of its own: until the new certificate is there, the old one names a table that is as it was.
        tag = f"{base.facts['memory_version']}-{lance_dataset(self.out).version}"
        tag_latest(self.out, tag)
        indexes = base.facts["indexes"] | added
        told = base.facts["highlights"] | told_of(indexes)
        self.facts = base.facts | {"indexes": indexes, "highlights": told, "table_tag": tag}
        return Receipts(self.folder)

    def indexed(self, base: Certificate, receipts: Receipts) -> Certificate:
        """The finished memory's certificate, with its indexes as they are now."""
        return base.model_copy(update={"facts": self.facts, "files": own_files(self.out, self.facts)})

    def finish(self, receipts: Receipts) -> Certificate:
        """List what was left out, and certify."""
        if self.config.dedup.mode != "off":
            write_parquet(join(self.out, "duplicates.parquet"), self.duplicates.table)
        dropped = self.duplicates if self.config.dedup.mode == "drop" else None
        write_rejected(self.out, len(self.facts["versions"]), self.embedded, dropped)
        certificate = account(self.config, self.embedded, self.new, self.base, self.facts, self.duplicates)
        return certificate.model_copy(update={"files": own_files(self.out, self.facts)})


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
