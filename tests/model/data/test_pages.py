"""A law of mapped values: they are what Arrow reads, or Arrow is asked."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.groups import RowGroups, Shard
from model.data.pages import find_values, map_values
from model.data.plan import Source
from model.data.shards import open_shards
from tests.model.data.test_loader import VIDEO

values = st.lists(st.one_of(st.none(), st.binary(max_size=40)), min_size=1, max_size=60)


def write(place: Path, column: list[bytes | None], **options) -> Shard:
    target = pa.StructArray.from_arrays([pa.array(column, pa.binary())], names=["data"])
    pq.write_table(pa.table({"target": target}), place, **options)
    return Shard(str(place))


@given(
    column=values,
    page_bytes=st.sampled_from([16, 200, 1 << 20]),
    rows=st.integers(1, 60),
    compression=st.sampled_from(["NONE", "ZSTD"]),
    dictionary=st.booleans(),
    version=st.sampled_from(["1.0", "2.0"]),
)
@settings(max_examples=150, deadline=None)
def test_mapped_values_are_those_that_arrow_reads(
    tmp_path_factory: pytest.TempPathFactory, column, page_bytes, rows, compression, dictionary, version
) -> None:
    shard = write(
        tmp_path_factory.mktemp("pages") / "a.parquet",
        column,
        row_group_size=rows,
        data_page_size=page_bytes,
        compression=compression,
        use_dictionary=dictionary,
        data_page_version=version,
    )
    mapped = [shard.map(group) for group in range(shard.file.num_row_groups)]
    for group, found in enumerate(mapped):
        expected = shard.file.read_row_group(group)["target"].combine_chunks().field("data").to_pylist()
        if found is not None:
            assert [view.tobytes() for view in found] == expected
        elif None not in expected:
            assert compression == "ZSTD" or dictionary or version == "2.0"


def test_lengths_that_lie_are_left_to_arrow(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.parquet", [b"first", b"second"], use_dictionary=False, compression="NONE")
    assert shard.mapped is not None and map_values(shard.mapped, shard.file, 0, 0) is not None
    chunk = shard.file.metadata.row_group(0).column(0)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    place = data.index(b"\x05\x00\x00\x00first")
    data[place] = 4
    part = pa.py_buffer(bytes(data[chunk.data_page_offset :][: chunk.total_compressed_size]))
    assert find_values(part, 2, 2) is None


def test_shards_as_they_are_written_are_mapped(make_shards) -> None:
    groups = RowGroups(open_shards(str(make_shards(8))), (VIDEO,))
    row = groups.row(Source(0, 0, 0, (0, "pretrain")), 0)
    assert groups._open(groups.shards.groups[0].uri).map(0) is not None
    assert groups.num_bytes < len(row["target"]["data"])  # what is mapped isn't held
