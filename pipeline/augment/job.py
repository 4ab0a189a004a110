"""`vimi-data augment`: captions x memory -> multimodal prompts, guarded, as shards for the trainer.

clips (certified) ── slices ──▶ search ─▶ guard ─▶ choose ─▶ one shard a slice + receipt
memory's arrays, shared          in slice order:
rejected, meta, certificate last
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from infra.claim import open_job
from infra.cluster import ray_session
from infra.config import canonical_json
from infra.errors import ConfigError, TooManyFailuresError
from infra.storage import (
    Certificate,
    FileEntry,
    absolute,
    delete,
    join,
    list_files,
    require_certificate,
    write_certificate,
)
from pipeline.augment.config import AugmentConfig
from pipeline.augment.workbench import clip_config
from pipeline.augment.worker import AugmentWorker, good_rows, has_caption
from pipeline.embed.worker import row_doc_id
from pipeline.exclusion import read_exclusion
from pipeline.job import Receipts, Unit, run_units
from pipeline.memory import Memory, open_memory
from pipeline.retrieve.join import uses_arrays
from pipeline.schema import REJECTED, Status, content_id
from pipeline.shards import REJECTED_FILE, write_meta, write_shard

JOB = "augment"
LOOKED_AT = 256  # rows of each table that tell whether its clips are documents of the memory
PLACES = {"clips", "memory", "clip", "max_failed_frac", "timeout_s", "memory_bytes"}
"""Fields that say where or how long, not what: the inputs' content hashes stand for the places in
`config_hash`."""


@dataclass(frozen=True)
class Inputs:
    """What the door found: certified inputs."""

    clips: list[tuple[str, Certificate]]
    memory: Memory
    hashes: dict[str, str]


def check(config: AugmentConfig) -> Inputs:
    """Refuse what can be refused before Ray starts.

    Raises:
        ConfigError: an input that is missing, foreign, empty or built with another CLIP.
    """
    clips = []
    for uri in config.clips:
        certificate = require_certificate(uri, job="crawl", made_by="vimi-data crawl")
        clips.append((absolute(uri), certificate))
    if not sum(certificate.num_out for _, certificate in clips):
        raise ConfigError(
            f"no usable clip in {', '.join(config.clips)}",
            cure="look at the reasons in the certificate, mend the corpus, crawl again",
        )
    memory = open_memory(config.memory, version=config.memory_version)
    if not memory.num_documents:
        raise ConfigError(f"the memory {config.memory} is empty", cure="build it from a corpus")
    _check_clip(config, clips, memory)
    if not uses_arrays(config.retrieve, memory.num_documents):
        from pipeline.retrieve.lance import check_indexes

        check_indexes(memory, config.retrieve)
    hashes = {f"clips-{n}": certificate.content_hash() for n, (_, certificate) in enumerate(clips)}
    hashes["memory"] = content_id(memory.version, memory.model_hash)
    if config.guard.exclude is not None:
        listed = read_exclusion(absolute(config.guard.exclude), source_pattern=config.guard.source_pattern)
        groups = (listed.ids, listed.hashes, listed.sources, listed.phashes)
        hashes["exclude"] = content_id(*(str(sorted(group)) for group in groups))
    return Inputs(clips, memory, hashes)


def _check_clip(config: AugmentConfig, clips: list[tuple[str, Certificate]], memory: Memory) -> None:
    there = memory.certificate.facts.get("model", {}).get("name")
    wanted = config.clip
    is_file = wanted is not None and wanted.name.endswith(".json")  # its identity shows when it is loaded
    if wanted is not None and there is not None and there != wanted.name and not is_file:
        raise ConfigError(
            f"clip {wanted.name!r}, but the memory {memory.uri} was embedded with {there!r}",
            legal="the memory's own CLIP",
            cure="leave clip out, or build a memory with that CLIP",
        )
    if wanted is not None or _needs_clip(config, clips, memory):
        from infra.clip.load import check_clip

        try:
            check_clip(clip_config(config, memory))
        except ConfigError as error:
            raise ConfigError(
                f"some clips are not in the memory, so a CLIP is needed to guard them: {error}",
                cure="set clip to where its weights lie; or, with retriever bm25, set vectors to stored",
            ) from None


def _needs_clip(config: AugmentConfig, clips: list[tuple[str, Certificate]], memory: Memory) -> bool:
    """Will a worker have to load the CLIP? Judged by the first rows of each table."""
    if not config.retrieve.k or (config.vectors == "stored" and config.retrieve.retriever == "bm25"):
        return False
    if config.retrieve.retriever != "bm25" and config.retrieve.query_dropout_frac:
        return True
    for uri, certificate in clips:
        part = next((f for f in certificate.files if f.path.startswith("part-") and f.rows), None)
        if part is None:
            continue
        rows = good_rows(join(uri, part.path), 0, min(part.rows, LOOKED_AT))
        ids = {row_doc_id(row) for row in rows if has_caption(row)}
        if len(memory.rows(sorted(ids), ["doc_id"])) < len(ids):
            return True
    return False


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
    with ray_session(config.ray):
        receipts = run_units(
            config.out,
            units,
            partial(AugmentWorker, config, config_hash),
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
