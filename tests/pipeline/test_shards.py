"""Shards: the same rows give the same bytes, and every row is found where meta.parquet says."""

import pickle
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.certificate import Certificate, FileEntry, write_certificate
from infra.errors import ConfigError, DataError
from pipeline.schema import PROMPTS, check_table
from pipeline.shards import (
    ShardSet,
    group_sizes,
    shard_bytes,
    shard_name,
    write_meta,
    write_shard,
)


def prompt_row(number: int) -> dict[str, Any]:
    segments = [
        {"type": "text", "role": "retrieved", "text": f"text {number}"},
        {"type": "image", "role": "retrieved", "image": bytes([number % 256]) * 50},
        {"type": "text", "role": "caption", "text": f"caption {number}"},
    ]
    target = {"kind": "frames", "data": bytes(range(48)), "num_frames": 1, "height_px": 4, "width_px": 4}
    return {
        "prompt_id": f"p{number}",
        "task": "pretrain",
        "clip_id": f"c{number}",
        "media": "video",
        "caption": f"caption {number}",
        "segments": segments,
        "num_documents": 1,
        "flags": [],
        "target": target | {"fps": 6.0},
        "fps": 30.0,
    }


def make_set(out: Path, sizes: list[int], row_group_rows: int) -> ShardSet:
    files: list[FileEntry] = []
    first = 0
    for number, size in enumerate(sizes):
        rows = [prompt_row(first + i) for i in range(size)]
        place = str(out / shard_name(number))
        files.append(write_shard(place, rows, PROMPTS, row_group_rows=row_group_rows))
        first += size
    files.append(write_meta(str(out), files, row_group_rows=row_group_rows))
    certificate = Certificate(job="augment", config_hash="x", num_in=first, num_out=first, files=files)
    write_certificate(str(out), certificate)
    return ShardSet(str(out))


def test_same_rows_give_same_bytes_however_the_table_is_chunked() -> None:
    rows = [prompt_row(i) for i in range(20)]
    whole = shard_bytes(rows, PROMPTS, row_group_rows=8)
    pieces = pa.concat_tables([pa.Table.from_pylist(rows[i : i + 3], PROMPTS) for i in range(0, 20, 3)])
    assert shard_bytes(pieces, PROMPTS, row_group_rows=8) == whole
    assert shard_bytes(pieces.replace_schema_metadata(None), PROMPTS, row_group_rows=8) == whole


def test_shard_holds_the_schema_and_its_row_groups(tmp_path: Path) -> None:
    write_shard(str(tmp_path / "a.parquet"), [prompt_row(i) for i in range(20)], PROMPTS, row_group_rows=8)
    file = pq.ParquetFile(tmp_path / "a.parquet")
    check_table(file.schema_arrow, PROMPTS, "shard")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == group_sizes(20, 8) == [8, 8, 4]


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), row_group_rows=st.integers(1, 5))
def test_every_row_is_found_through_meta(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], row_group_rows: int
) -> None:
    shards = make_set(tmp_path_factory.mktemp("set"), sizes, row_group_rows)
    assert shards.num_rows == sum(sizes) == sum(group.num_rows for group in shards.row_groups)
    for row in range(shards.num_rows):
        group, place = shards.find(row)
        assert shards.read_row_group(group, ["clip_id"])["clip_id"][place].as_py() == f"c{row}"


def test_a_shard_set_travels_to_other_processes_and_threads(tmp_path: Path) -> None:
    shards = pickle.loads(pickle.dumps(make_set(tmp_path, [5, 5], 2)))
    seen: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i: seen.append(shards.read_row_group(i).num_rows))
        for i in range(len(shards))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(seen) == 10


def test_uncertified_or_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no certified shards"):
        ShardSet(str(tmp_path))
    make_set(tmp_path, [3], 2)
    (tmp_path / "meta.parquet").write_bytes(b"another")
    with pytest.raises(DataError, match="not the file that was certified"):
        ShardSet(str(tmp_path))
    write_certificate(str(tmp_path), Certificate(job="crawl", config_hash="x", num_in=0, num_out=0))
    with pytest.raises(ConfigError, match="made by 'crawl'"):
        ShardSet(str(tmp_path))
