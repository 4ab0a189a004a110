"""`vimi-data build-index`: clips tables -> the retrieval memory, embedded, indexed, certified.

    clips (certified) ── slices ──▶ CLIP workers ──▶ staged Arrow files + receipts
                                          one committer, in unit order ──▶ LanceDB
                          compact, BM25 index, vector indexes held to their recall, tag, certificate

Killed at any moment, the same command ends in the same table. A finished memory grows: the same command
with more tables and `grow` adds the documents that are new.
"""

import time
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from infra.claim import JOB_FILE, open_job
from infra.clip import ClipConfig
from infra.clip.load import check_clip
from infra.cluster import RayConfig, ray_session
from infra.config import Config
from infra.errors import ConfigError, DataError, TooManyFailuresError
from infra.storage import (
    Certificate,
    absolute,
    delete,
    exists,
    filesystem,
    join,
    read_json,
    require_certificate,
    write_bytes,
    write_certificate,
    write_json,
)
from pipeline.embed import EmbedConfig, Embedder, clip_units
from pipeline.job import Receipt, run_units
from pipeline.memory.commit import STAGED, commit_staged, create_table
from pipeline.memory.finish import finish
from pipeline.memory.index import IndexConfig
from pipeline.memory.store import LANCE_FOLDER, open_table, version_tag
from pipeline.schema import CLIPS, REJECTED, Status, check_table

JOB, BUILD, MEASURED = "build-index", "build", "measured.json"
Tables = list[tuple[str, Certificate]]


class BuildIndexConfig(Config):
    """Which tables become which memory."""

    clips: tuple[str, ...]
    """Folders made by `vimi-data crawl`: videos and pictures with captions."""
    out: str
    """Folder of the memory."""
    grow: bool = False
    """Add to the memory that is in `out`: what it holds already is neither read nor embedded again."""
    clip: ClipConfig = ClipConfig()
    """The CLIP that embeds pictures and texts."""
    embed: EmbedConfig = EmbedConfig()
    """From a clip to a document."""
    index: IndexConfig = IndexConfig()
    """From vectors to a search with a declared recall."""
    rows_per_unit: int = Field(default=256, ge=1, le=65536)
    """Clips of one unit of work: what a kill loses at most, for each worker. Ours."""
    max_failed_frac: float = Field(default=0.1, ge=0, le=1)
    """The job fails when more than this share of the good clips can't become documents. Ours."""
    seed: int = 0
    """Of the sample that verifies the recall."""
    ray: RayConfig = RayConfig()
    num_workers: int | None = Field(default=None, ge=1)
    """Embedding workers; None = one a GPU, or one for every 8 CPUs."""


FREE = {"clips", "grow", "max_failed_frac"}
"""Fields that may differ when the same command is given again or the memory grows."""


def run(config: BuildIndexConfig) -> Certificate:
    """Embed, commit, index, verify, certify.

    Raises:
        ConfigError: refused at the door (see `check`).
        DataError: no documents, two models in one memory, or a recall below the declared one.
        TooManyFailuresError: more rows failed than `max_failed_frac` allows.
    """
    started_s = time.monotonic()
    tables, base = check(config)
    out = absolute(config.out)
    new = [(uri, table) for uri, table in tables if not _is_in(base, table)]
    if base is not None and not new:
        delete(join(out, BUILD))
        return base
    _begin(out, new, base)
    units = list(clip_units(new, rows_per_unit=config.rows_per_unit, key=_unit_key(config)))
    with ray_session(config.ray):
        embedder, resources = _embedder(config, out, base)
        receipts = run_units(join(out, BUILD), units, embedder, what="embed", total=len(units), **resources)
    measured: dict[str, Any] = {"embed_s": time.monotonic() - started_s}
    ordered = [receipt for _, receipt in receipts.in_order(units)]
    model = _one_model(ordered, base, out)
    _check_failures(ordered, config)
    table = create_table(out, model["dim"])
    commit_staged(table, join(out, BUILD), ordered)
    facts, indexed = finish(table, config.index, seed=config.seed, before=base.facts if base else None)
    certificate = _certificate(config, table, ordered, new, base, model | {"indexes": facts})
    _write_rejected(out, ordered, certificate)
    write_json(join(out, MEASURED), measured | indexed | _volume(ordered))
    _tag(table, certificate)
    certificate = certificate.model_copy(
        update={"created_at_s": time.time(), "wall_s": time.monotonic() - started_s}
    )
    write_certificate(out, certificate)
    delete(join(out, BUILD))
    return certificate


def check(config: BuildIndexConfig) -> tuple[Tables, Certificate | None]:
    """Refuse what can be refused before Ray starts.

    Returns:
        The input tables with their certificates, and the memory's own if it is there.

    Raises:
        ConfigError: no or foreign input tables, an unknown CLIP, an output of something else, or a
            memory that would grow without `grow`.
    """
    if not config.clips:
        raise ConfigError("no clips to build a memory of", cure="set clips to folders made by crawl")
    tables = [(absolute(uri), _input(absolute(uri))) for uri in config.clips]
    check_clip(config.clip)
    out = absolute(config.out)
    if not exists(join(out, JOB_FILE)) and exists(join(out, LANCE_FOLDER)):
        raise ConfigError(
            f"{out} holds a LanceDB directory that this job didn't make", cure="choose another out"
        )
    base = open_job(out, job=JOB, config=config, inputs={}, hash_exclude=FREE)
    if base is not None:
        _check_table_is_there(out)
        fresh = [uri for uri, table in tables if not _is_in(base, table)]
        if fresh and not config.grow:
            raise ConfigError(
                f"{out} is a finished memory of other tables than {', '.join(fresh)}",
                cure="set grow=true to add them, or choose another out",
            )
    return tables, base


def _input(uri: str) -> Certificate:
    certificate = require_certificate(uri, job="crawl", made_by="vimi-data crawl")
    for part in (f for f in certificate.files if f.path.endswith(".parquet")):
        fs, path = filesystem(join(uri, part.path))
        try:
            found = pq.read_schema(fs.open_input_file(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise ConfigError(f"{join(uri, part.path)} can't be read: {error}", cure="crawl again") from None
        try:
            check_table(found, CLIPS, join(uri, part.path))
        except ValueError as error:
            raise ConfigError(str(error), cure="give a folder made by `vimi-data crawl`") from None
        break
    return certificate


def _check_table_is_there(out: str) -> None:
    if open_table(out) is None:
        raise ConfigError(
            f"{out} holds a certificate, but its LanceDB table is gone",
            cure="restore it, or delete the folder and build again",
        )


def _is_in(base: Certificate | None, table: Certificate) -> bool:
    return base is not None and table.content_hash() in base.inputs.values()


def _begin(out: str, new: Tables, base: Certificate | None) -> None:
    """Start a build or continue the one that was stopped; a fresh one starts from the certified version."""
    claim, inputs = join(out, BUILD, "inputs.json"), [table.content_hash() for _, table in new]
    if exists(claim):
        if read_json(claim) != inputs:
            raise ConfigError(
                f"{out} holds an unfinished build of other tables",
                cure=f"run the same command again, or delete {join(out, BUILD)} to start this one",
            )
        return
    if base is None:
        delete(join(out, LANCE_FOLDER))  # of a build that was given up
    elif (table := open_table(out)) is not None:
        table.checkout(base.facts["memory_version"])
        table.restore()
    write_json(claim, inputs)


def _unit_key(config: BuildIndexConfig) -> str:
    return config.hash(exclude=set(BuildIndexConfig.model_fields) - {"clip", "embed"})


def _embedder(config: BuildIndexConfig, out: str, base: Certificate | None) -> tuple[Embedder, dict[str, Any]]:
    """The worker, and what it needs of the session that is running."""
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    workers = config.num_workers or gpus or max(1, cpus // 8)
    threads = max(1, min(8, cpus // workers))
    embedder = Embedder(
        clip=config.clip,
        embed=config.embed,
        staged=join(out, BUILD, STAGED),
        base=out if base else None,
        base_version=base.facts["memory_version"] if base else None,
        device="cuda" if gpus else "cpu",
        threads=threads,
    )
    # One worker on CPUs needs no actor: Ray gives it the same process, and the model in it, again.
    return embedder, {
        "num_workers": workers,
        "num_cpus": threads,
        "num_gpus": 1.0 if gpus else 0.0,
        "actors": workers > 1 or gpus > 0,
    }


def _one_model(receipts: list[Receipt], base: Certificate | None, out: str) -> dict[str, Any]:
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


def _check_failures(receipts: list[Receipt], config: BuildIndexConfig) -> None:
    good = sum(receipt["rows_ok"] for receipt in receipts)
    failed = sum(1 for r in receipts for rejected in r["rejected"] if Status(rejected[2]).is_dead)
    if failed > config.max_failed_frac * good:
        first = next(r["rejected"][0] for r in receipts if r["rejected"])
        raise TooManyFailuresError(
            f"{failed} of {good} good clips could not be embedded, more than max_failed_frac="
            f"{config.max_failed_frac} allows; the first: {first[1]}: {first[2]} ({first[3]})"
        )


def _certificate(
    config: BuildIndexConfig,
    table: Any,
    receipts: list[Receipt],
    new: Tables,
    base: Certificate | None,
    facts: dict[str, Any],
) -> Certificate:
    """Counts of the whole memory: earlier builds' and this one's."""
    rows = table.count_rows()
    fates = sum((Counter(receipt["fates"]) for receipt in receipts), Counter())
    staged = sum(receipt["documents"] for receipt in receipts)
    inserted = rows - (base.num_out if base else 0)
    fates[Status.FILTERED_DUPLICATE.value] += staged - inserted
    before = Counter(base.filtered) + Counter(base.dead) if base else Counter()
    counts = {name: count for name, count in sorted((fates + before).items()) if count}
    inputs = list(base.inputs.values()) if base else []
    inputs += [certificate.content_hash() for _, certificate in new]
    tag = version_tag(table, facts["model_hash"])
    versions = [*(base.facts["versions"] if base else []), tag]
    return Certificate(
        job=JOB,
        config_hash=config.hash(exclude={"out", "ray", "num_workers", *FREE}),
        num_in=sum(receipt["rows"] for receipt in receipts) + (base.num_in if base else 0),
        num_out=rows,
        filtered={n: c for n, c in counts.items() if Status(n).is_filtered},
        dead={n: c for n, c in counts.items() if Status(n).is_dead},
        inputs={f"clips-{i}": digest for i, digest in enumerate(inputs)},
        facts=facts | {"memory_version": tag, "versions": list(dict.fromkeys(versions))},
    )


def _tag(table: Any, certificate: Certificate) -> None:
    """Tag the version; it holds these documents with their indexes."""
    tag = certificate.facts["memory_version"]
    if tag in table.tags.list():
        table.tags.update(tag, table.version)
    else:
        table.tags.create(tag, table.version)


def _volume(receipts: list[Receipt]) -> dict[str, Any]:
    return {
        "rows": sum(receipt["rows"] for receipt in receipts),
        "documents": sum(receipt["documents"] for receipt in receipts),
    }


def _write_rejected(out: str, receipts: list[Receipt], certificate: Certificate) -> None:
    """The clips that this build could not use, with the reason; one file a build."""
    rows = [rejected for receipt in receipts for rejected in receipt["rejected"]]
    columns = list(zip(*rows, strict=True)) or [()] * len(REJECTED)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, REJECTED, strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=REJECTED), sink)
    name = f"rejected-{len(certificate.facts['versions']):03d}.parquet"
    write_bytes(join(out, name), sink.getvalue().to_pybytes())
