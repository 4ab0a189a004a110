"""Build-index's config, what is refused before Ray starts, and where a build begins."""

from pydantic import Field

from infra.certificate import Certificate, require_certificate
from infra.claim import JOB_FILE, find_job, open_job
from infra.clip import ClipConfig, check_clip, clip_dim
from infra.config import Incidental, Location
from infra.errors import ConfigError
from infra.storage import delete, exists, join, read_json, write_json
from pipeline.job import JobConfig
from pipeline.memory.embed.pictures import KEY_FRAMES
from pipeline.memory.index import kinds
from pipeline.memory.near_duplicates import DedupConfig
from pipeline.memory.recall import IndexConfig, K
from pipeline.memory.store import LANCE_FOLDER, check_table_files, open_table
from pipeline.schema import CLIPS, check_table
from pipeline.shards import open_part

JOB, BUILD = "build-index", "build"


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
    index: IndexConfig = IndexConfig()
    """From vectors to a search with a declared recall."""
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
        f"recall@{K} of at least {config.index.recall} for {', '.join(config.index.columns)}"
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
            memory that would grow without `grow`; an index that will not fit `max_index_bytes`.
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
        check_table_files(out, base, but="/_refs/")  # a build that was killed may have moved a tag
        _check_table_is_there(out)
    fresh = [(uri, table) for uri, table in tables if not is_in(base, table)]
    if base is not None and fresh and not config.grow:
        raise ConfigError(
            f"{out} is a finished memory of other tables than {', '.join(uri for uri, _ in fresh)}",
            cure="add them with --grow (grow=true), or choose another out",
        )
    dim = clip_dim(config.clip)
    if dim is not None and fresh:  # refused now, not once everything is embedded
        kinds(config.index, sum(table.num_out for _, table in fresh) + (base.num_out if base else 0), dim)
    return fresh, base


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


def _check_table_is_there(out: str) -> None:
    if open_table(out) is None:
        raise ConfigError(
            f"{out} holds a certificate, but its LanceDB table is gone",
            cure="restore it, or delete the folder and build again",
        )


def is_in(base: Certificate | None, table: Certificate) -> bool:
    return base is not None and table.content_hash() in base.inputs.values()


def begin(config: BuildIndexConfig, new: Tables, base: Certificate | None) -> None:
    """Claim the folder; start a build or continue the one that was stopped, from the certified version."""
    out = config.out
    open_job(out, job=JOB, config=config, inputs={})
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
