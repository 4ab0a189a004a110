"""Clips tables -> units of work: slices of certified parts, the same for any number of workers."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Certificate, filesystem, join
from pipeline.job import Unit
from pipeline.schema import content_id


def clip_units(tables: Sequence[tuple[str, Certificate]], *, rows_per_unit: int, key: str) -> Iterator[Unit]:
    """Slices of `rows_per_unit` rows of the certified parts, in the order of tables and parts.

    Args:
        tables: (folder, its certificate).
        rows_per_unit: the most rows of a unit.
        key: hash of what else decides the result (model, sizes); part of the unit's id.
    """
    for uri, certificate in tables:
        for part in (f for f in certificate.files if f.path.endswith(".parquet")):
            for start in range(0, part.rows, rows_per_unit):
                rows = min(rows_per_unit, part.rows - start)
                yield Unit(
                    id=content_id("embed", key, part.sha256, start, rows),
                    payload={"uri": join(uri, part.path), "start": start, "rows": rows},
                )


def read_slice(uri: str, start: int, rows: int, columns: Sequence[str]) -> pa.Table:
    """Rows [start, start + rows) of a Parquet file; reads only the row groups that hold them."""
    fs, path = filesystem(uri)
    with pq.ParquetFile(fs.open_input_file(path)) as file:
        groups, first, offset = [], None, 0
        for index in range(file.num_row_groups):
            size = file.metadata.row_group(index).num_rows
            if offset < start + rows and offset + size > start:
                first = offset if first is None else first
                groups.append(index)
            offset += size
        table = file.read_row_groups(groups, columns=list(columns), use_threads=False)
    return table.slice(start - (first or 0), rows)


def payload_slice(payload: dict[str, Any], columns: Sequence[str]) -> pa.Table:
    return read_slice(payload["uri"], payload["start"], payload["rows"], columns)
