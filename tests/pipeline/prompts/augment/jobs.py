"""Jobs over the tiny world of these tests, and what they leave."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from infra.storage import list_files
from pipeline.prompts.augment import AugmentConfig
from pipeline.shards import ShardSet


def config(world: Any, out: Path, **more: Any) -> AugmentConfig:
    values: dict[str, Any] = {"clips": world.clips, "memory": world.memory, "out": str(out)}
    values |= {"shard_rows": 8, "row_group_rows": 4}
    return AugmentConfig.model_validate(values | more)


def read(out: Path) -> list[dict[str, Any]]:
    shards = ShardSet(str(out))
    groups = [shards.read_row_group(i) for i in range(len(shards))]
    return pa.concat_tables(groups).to_pylist() if groups else []


def contents(out: Path) -> dict[str, bytes]:
    return {Path(f).name: Path(f).read_bytes() for f in list_files(str(out), suffix=".parquet")}
