"""What is refused before Ray starts, and where a build begins."""

import pyarrow as pa
import pyarrow.parquet as pq

from infra.claim import JOB_FILE, open_job
from infra.clip.load import check_clip
from infra.errors import ConfigError
from infra.storage import (
    Certificate,
    absolute,
    delete,
    exists,
    filesystem,
    join,
    read_json,
    require_certificate,
    write_json,
)
from pipeline.memory.build_index.config import BUILD, FREE, JOB, BuildIndexConfig
from pipeline.memory.store import LANCE_FOLDER, open_table
from pipeline.schema import CLIPS, check_table

Tables = list[tuple[str, Certificate]]


def check(config: BuildIndexConfig) -> str:
    """The door, and the plan in words (what `--dry-run` prints)."""
    tables, base = door(config)
    rows = sum(table.num_out for uri, table in tables if not is_in(base, table))
    there = f", beside {base.num_out:,} documents that are there" if base else ""
    return (
        f"up to {rows:,} documents{there}, embedded by {config.clip.name} in units of {config.rows_per_unit}; "
        f"recall@{config.index.k} of at least {config.index.recall} for {', '.join(config.index.columns)}"
    )


def door(config: BuildIndexConfig) -> tuple[Tables, Certificate | None]:
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
        fresh = [uri for uri, table in tables if not is_in(base, table)]
        if fresh and not config.grow:
            raise ConfigError(
                f"{out} is a finished memory of other tables than {', '.join(fresh)}",
                cure="add them with --grow (grow=true), or choose another out",
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


def is_in(base: Certificate | None, table: Certificate) -> bool:
    return base is not None and table.content_hash() in base.inputs.values()


def begin(out: str, new: Tables, base: Certificate | None) -> None:
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
