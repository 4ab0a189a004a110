"""What jobs over certified prompts share: which inputs they refuse, and the units that their rows make."""

from collections.abc import Iterator

from infra.certificate import require_certificate
from infra.errors import ConfigError
from infra.storage import list_files
from pipeline.journal import Unit
from pipeline.shards import ShardSet, is_shard, open_part


def check_prompts(prompts: str, clips: str | None) -> ShardSet:
    """The certified prompts.

    Raises:
        ConfigError: none there, or no certified clips.
    """
    require_certificate(prompts, job="augment", made_by="vimi-data augment")
    shards = ShardSet(prompts)
    if clips is not None:
        require_certificate(clips, job="crawl", made_by="vimi-data crawl")
    if shards.num_rows == 0:
        raise ConfigError(f"{prompts} holds no prompts", cure="see its rejected.parquet for the reasons")
    return shards


def plan_units(shards: ShardSet, clips: str | None, unit_rows: int) -> Iterator[Unit]:
    """Runs of whole row groups of about `unit_rows` rows, numbered in order; each makes one shard."""
    moved = _moved_sources(clips) if clips else {}
    groups: list[int] = []
    rows = number = 0
    for index, group in enumerate(shards.row_groups):
        groups.append(index)
        rows += group.num_rows
        if rows >= unit_rows or index + 1 == len(shards):
            ids = [i for g in groups for i in shards.read_row_group(g, ["clip_id"])["clip_id"].to_pylist()]
            local = {i: moved[i] for i in ids if i in moved}
            yield Unit(f"unit-{number:06d}", {"number": number, "row_groups": groups, "local": local})
            groups, rows, number = [], 0, number + 1


def _moved_sources(clips: str) -> dict[str, str]:
    """clip_id -> where its bytes lie, for the clips whose bytes don't lie at `source_uri`."""
    moved = {}
    for file in list_files(clips, suffix=".parquet", recursive=False):
        if not is_shard(file):
            continue
        columns = ["clip_id", "source_uri", "local_uri"]
        for row in open_part(file).read(columns).to_pylist():
            if row["local_uri"] and row["local_uri"] != row["source_uri"]:
                moved[row["clip_id"]] = row["local_uri"]
    return moved
