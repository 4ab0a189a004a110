"""`vimi-data augment`: captions x memory -> multimodal prompts, guarded, as shards for the trainer.

clips (certified) ── blocks of slices ──▶ x shards of the memory ──▶ candidates      (join.py)
slices ──▶ candidates of all shards ─▶ guard ─▶ choose ─▶ one file of prompts a slice + receipt
in slice order: rejected, meta, certificate last
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from infra.certificate import Certificate, FileEntry, require_certificate
from infra.cluster import wants_gpus
from infra.errors import ConfigError, DataError
from infra.storage import delete, join
from pipeline.job import count_fates, output_hash, refuse_failures, run_job, run_units
from pipeline.journal import Receipts, Unit
from pipeline.memory import Memory, open_memory
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.store import check_index
from pipeline.prompts.augment.config import AugmentConfig
from pipeline.prompts.augment.join import (
    CHECKED,
    FOLDER,
    CheckWorker,
    QueryWorker,
    TileWorker,
    check_room,
    check_units,
    is_joined,
    query_units,
    tile_units,
)
from pipeline.prompts.augment.relevance import sentences, total
from pipeline.prompts.augment.slices import clip_config, good_rows, has_caption
from pipeline.prompts.augment.worker import AugmentWorker
from pipeline.prompts.exclusion import read_exclusion
from pipeline.schema import Status, content_id
from pipeline.shards import is_shard, write_meta, write_rejected

JOB = "augment"
LOOKED_AT = 256  # rows of each table that tell whether its clips are documents of the memory


@dataclass(frozen=True)
class Inputs:
    """What preflight found: certified inputs."""

    clips: list[tuple[str, Certificate]]
    memory: Memory
    hashes: dict[str, str]


def run(config: AugmentConfig) -> Certificate:
    """Make the prompts, or continue; a finished job is recognised and left alone.

    Raises:
        ConfigError: refused before Ray starts (see `check`).
        TooManyFailuresError: more clips failed than `max_failed_frac` allows.
    """
    inputs = check(config)
    units = list(make_units(config, inputs))
    finish = partial(_finish, config, inputs, units)
    certificate = run_job(JOB, config, inputs.hashes, work=partial(_work, config, inputs, units), finish=finish)
    for folder in (FOLDER, CHECKED):
        delete(join(config.out, folder))
    return certificate


def _work(config: AugmentConfig, inputs: Inputs, units: list[Unit]) -> Receipts:
    """Read the memory through, join, make the prompts; call inside a `ray_session`."""

    def run(what: str, units: list[Unit], worker: Any, *, out: str = config.out, **options: Any) -> Receipts:
        options = {"num_workers": config.num_workers, **options}
        return run_units(out, units, worker, what=what, total=len(units), **options)

    memory, joined = inputs.memory, is_joined(config, inputs.memory)
    checked = join(config.out, CHECKED)
    delete(checked)  # of a run that was killed: what lay there then is not what lies there now
    told = run("read the memory through", check_units(memory), partial(CheckWorker, config), out=checked)
    for _, receipt in told.in_order(check_units(memory)):
        if "damage" in receipt:
            delete(checked)
            raise DataError(receipt["damage"])
    if joined:
        by_vectors = config.retrieve.method.needs_vectors
        if by_vectors:
            run("queries", query_units(units), partial(QueryWorker, config))
        gpus = float(by_vectors and wants_gpus(config.ray))
        run("search", tile_units(units, memory), partial(TileWorker, config), num_gpus=gpus)
    worker = partial(AugmentWorker, config, output_hash(config, inputs.hashes), joined=joined)
    return run(JOB, units, worker)


def check(config: AugmentConfig) -> Inputs:
    """Refuse what can be refused before Ray starts.

    Raises:
        ConfigError: an input that is missing, foreign, empty or built with another CLIP.
    """
    clips = []
    for uri in config.clips:
        certificate = require_certificate(uri, job="crawl", made_by="vimi-data crawl")
        clips.append((uri, certificate))
    if not sum(certificate.num_out for _, certificate in clips):
        raise ConfigError(
            f"no usable clip in {', '.join(config.clips)}",
            cure="look at the reasons in the certificate, mend the corpus, crawl again",
        )
    memory = open_memory(config.memory, version=config.memory_version, read_through=False)
    check_index(memory)
    if not memory.num_documents:
        raise ConfigError(f"the memory {config.memory} is empty", cure="build it from a corpus")
    _check_clip(config, clips, memory)
    check_room(config, memory, sum(certificate.num_out for _, certificate in clips))
    hashes = {f"clips-{n}": certificate.content_hash() for n, (_, certificate) in enumerate(clips)}
    hashes["memory"] = content_id(memory.version, memory.model_hash)
    if config.guard.exclude is not None:
        listed = read_exclusion(config.guard.exclude, source_pattern=config.guard.source_pattern)
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
    if wanted is not None or needs_clip(config, clips, memory):
        from infra.clip import check_clip

        try:
            check_clip(clip_config(config, memory))
        except ConfigError as error:
            raise ConfigError(
                f"some clips are not in the memory, so a CLIP is needed to guard them: {error}",
                cure="set clip to where its weights lie; or, with retriever bm25, set vectors to stored",
            ) from None


def needs_clip(config: AugmentConfig, clips: list[tuple[str, Certificate]], memory: Memory) -> bool:
    """Will a worker have to load the CLIP? Judged by the first rows of each table."""
    if not config.retrieve.k or (config.vectors == "stored" and not config.retrieve.method.needs_vectors):
        return False
    for uri, certificate in clips:
        part = next((f for f in certificate.files if is_shard(f.path) and f.rows), None)
        if part is None:
            continue
        rows = good_rows(join(uri, part.path), 0, min(part.rows, LOOKED_AT))
        ids = {row_doc_id(row) for row in rows if has_caption(row)}
        if len(memory.rows(sorted(ids), ["doc_id"])) < len(ids):
            return True
    return False


def make_units(config: AugmentConfig, inputs: Inputs) -> Iterator[Unit]:
    """Slices of `shard_rows` rows over all parts of all tables, one after the other."""
    pieces: list[list[Any]] = []
    size = number = 0
    for uri, certificate in inputs.clips:
        for part in (f for f in certificate.files if is_shard(f.path)):
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
    relevance = total([receipt["relevance"] for receipt in found if receipt["relevance"]])
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
            "remarks": sentences(relevance),
            "relevance": {name: round(value, 4) for name, value in relevance.items()},
            "retriever": config.retrieve.retriever,
            "k": config.retrieve.k,
            "max_similarity": next((r["max_similarity"] for r in found if r["max_similarity"]), None),
            "num_documents": dict(sorted(documents.items(), key=lambda item: int(item[0]))),
            "fewer_than_k": sum(c for n, c in documents.items() if int(n) < config.retrieve.k),
            "refused": dict(sorted(sum((Counter(r["refused"]) for r in found), Counter()).items())),
        },
    )
