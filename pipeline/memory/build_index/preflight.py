"""Build-index's config, what is refused before Ray starts, and where a build begins."""

from pydantic import Field

from infra.certificate import Certificate, require_certificate
from infra.claim import JOB_FILE, find_job, open_job
from infra.clip import ClipConfig, check_clip, clip_dim
from infra.config import Incidental, Location
from infra.errors import ConfigError
from infra.storage import delete, exists, free_bytes, join, read_json, write_json
from pipeline.job import JobConfig
from pipeline.memory.build_index.duplicates import DedupConfig
from pipeline.memory.build_index.index import IndexConfig, K
from pipeline.memory.embed.pictures import KEY_FRAMES
from pipeline.memory.retrieve.analysis import Analysis
from pipeline.memory.store import LANCE_FOLDER, SHARDS, check_index, lance_dataset, open_memory, table_tag
from pipeline.schema import CLIPS, check_table
from pipeline.shards import open_part

JOB, BUILD = "build-index", "build"
IMAGE_BYTES, DIM = 25_000, 512
"""A document's JPEG (384 px at quality 90: 15 to 40 kB) and the width of its vectors, where they aren't
known."""


class BuildIndexConfig(JobConfig):
    """Which tables become which memory."""

    clips: Incidental[tuple[Location, ...]]
    """Folders made by `vimi-data crawl`: videos and pictures with captions."""
    grow: Incidental[bool] = False
    """Add to the memory that is in `out`: what it holds already is neither read nor embedded again."""
    clip: ClipConfig = ClipConfig()
    """The CLIP that embeds pictures and texts."""
    key_frames: int = Field(default=KEY_FRAMES, ge=1, le=64)
    """Frames of a video whose image vectors are averaged (normalise, mean, normalise: RAGME, which
    takes every 25th frame). The document's picture is the middle one. 4 is ours."""
    dedup: DedupConfig = DedupConfig()
    """Duplicates among the documents."""
    analysis: Analysis = "english"
    """What BM25 compares: Lucene's English analysis (no stop words, stems), a language whose Snowball stems are
    taken, or none: words as they stand."""
    index: Incidental[IndexConfig] = IndexConfig()
    """Approximate vectors for `vimi-data search`; prompts don't depend on it."""
    shard_rows: Incidental[int] = Field(default=1_000_000, ge=1, le=100_000_000)
    """Documents of a shard, about: what a worker of the join holds at once, some 300 B each. What is made
    doesn't depend on it. Ours."""
    rows_per_unit: int = Field(default=256, ge=1, le=65536)
    """Clips of one unit of work: what a kill loses at most, for each worker. Ours."""
    max_failed_frac: Incidental[float] = Field(default=0.1, ge=0, le=1)
    """The job fails when more than this share of the good clips can't become documents. Ours."""


Tables = list[tuple[str, Certificate]]


def check(config: BuildIndexConfig) -> str:
    """Refuse what can be refused; the plan in words (what `--dry-run` prints)."""
    new, base = preflight(config, reach=False)
    rows = sum(table.num_out for _, table in new)
    there = f", beside {base.num_out:,} documents that are there" if base else ""
    return (
        f"up to {rows:,} documents{there}, embedded by {config.clip.name} in units of {config.rows_per_unit}; "
        f"shards of {config.shard_rows:,}; recall@{K} of at least {config.index.recall} for "
        f"{', '.join(config.index.columns)}"
    )


def preflight(config: BuildIndexConfig, *, reach: bool = True) -> tuple[Tables, Certificate | None]:
    """Refuse what can be refused before Ray starts; writes nothing.

    Args:
        config: of the build.
        reach: False = the hub is not asked for the CLIP's weights.

    Returns:
        The input tables that are new, with their certificates, and the memory's own if it is there.

    Raises:
        ConfigError: no or foreign input tables, an unknown CLIP, an output of something else, or a
            memory that would grow without `grow`; a disk without room.
    """
    if not config.clips:
        raise ConfigError("no clips to build a memory of", cure="set clips to folders made by crawl")
    tables = [(uri, _input(uri)) for uri in config.clips]
    check_clip(config.clip, reach=reach)
    out = config.out
    if not exists(join(out, JOB_FILE)) and exists(join(out, LANCE_FOLDER)):
        raise ConfigError(
            f"{out} holds a LanceDB directory that this job didn't make", cure="choose another out"
        )
    base = find_job(out, job=JOB, config=config, inputs={})
    if base is not None:
        check_index(open_memory(out, read_through=False))  # what grows is certified anew, its old index too
    fresh = [(uri, table) for uri, table in tables if not is_in(base, table)]
    if base is not None and fresh and not config.grow:
        raise ConfigError(
            f"{out} is a finished memory of other tables than {', '.join(uri for uri, _ in fresh)}",
            cure="add them with --grow (grow=true), or choose another out",
        )
    _check_room(config, sum(table.num_out for _, table in fresh))
    return fresh, base


def _check_room(config: BuildIndexConfig, documents: int) -> None:
    """Refuse a disk that can't hold the staged documents and the table; those that are there already count."""
    free = free_bytes(config.out)
    each = IMAGE_BYTES + 6 * (clip_dim(config.clip) or DIM)
    if free is not None and not exists(join(config.out, BUILD)) and 2 * each * documents > free:
        raise ConfigError(
            f"{documents:,} documents of about {each:,} bytes, staged and in the table, need "
            f"{2 * each * documents:,} bytes; {config.out} has {free:,}",
            cure="another disk or an object store as out",
        )


def _input(uri: str) -> Certificate:
    certificate = require_certificate(uri, job="crawl", made_by="vimi-data crawl")
    for part in (f for f in certificate.files if f.path.endswith(".parquet")):
        with open_part(join(uri, part.path)) as file:
            found = file.schema_arrow
        try:
            check_table(found, CLIPS, join(uri, part.path))
        except ValueError as error:
            raise ConfigError(str(error), cure="give a folder made by `vimi-data crawl`") from None
        break
    return certificate


def is_in(base: Certificate | None, table: Certificate) -> bool:
    return base is not None and table.content_hash() in base.inputs.values()


def begin(config: BuildIndexConfig, new: Tables, base: Certificate | None) -> None:
    """Claim the folder; start a build or continue the one that was stopped, from the certified version."""
    out = config.out
    open_job(out, job=JOB, config=config, inputs={})
    claim = join(out, BUILD, "inputs.json")
    inputs = {"tables": [table.content_hash() for _, table in new], "shard_rows": config.shard_rows}
    if exists(claim):
        there = read_json(claim)
        if there != inputs:
            what = "of other tables" if there["tables"] != inputs["tables"] else "in other shards"
            raise ConfigError(
                f"{out} holds an unfinished build {what} (shard_rows={there['shard_rows']})",
                cure=f"run the same command again, or delete {join(out, BUILD)} to start this one",
            )
        return
    if base is None:
        for folder in (LANCE_FOLDER, SHARDS):
            delete(join(out, folder))  # of a build that was given up
    else:
        dataset = lance_dataset(out, table_tag(base.facts))
        if dataset.version != lance_dataset(out).version:
            dataset.restore()
    write_json(claim, inputs)
