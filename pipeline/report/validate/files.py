"""Files, row counts, schemas: is the folder what its certificate says?"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Certificate, exists, join, list_files, read_bytes, sha256_file, size_bytes
from pipeline.report.validate.findings import Report
from pipeline.schema import PROMPTS, REJECTED, check_table
from pipeline.shards import REJECTED_FILE, ShardSet, group_sizes


def check_files(uri: str, certificate: Certificate, report: Report) -> set[str]:
    """Names of the files that are exactly what was certified."""
    whole = set()
    for entry in certificate.files:
        place = join(uri, entry.path)
        report.checked["files"] += 1
        if not exists(place):
            report.add("files", f"{entry.path} is missing")
        elif size_bytes(place) != entry.num_bytes or sha256_file(place) != entry.sha256:
            report.add("files", f"{entry.path} is not the file that was certified")
        else:
            whole.add(entry.path)
    listed = {entry.path for entry in certificate.files}
    for file in list_files(uri, suffix=".parquet", recursive=False):
        if file.rpartition("/")[2] not in listed:
            report.add("files", f"{file.rpartition('/')[2]} is not in the certificate")
    return whole


def check_meta(uri: str, certificate: Certificate, whole: set[str], report: Report) -> None:
    """Row counts of certificate, meta.parquet and the shards' own footers agree; schemas are right."""
    groups: dict[str, list[int]] = {}
    first_row = 0
    for group in ShardSet(uri).row_groups:
        groups.setdefault(group.file, []).append(group.num_rows)
        if group.first_row != first_row:
            report.add("meta", f"{group.file} group {group.row_group} begins at {group.first_row}")
        first_row += group.num_rows
    if first_row != certificate.num_out:
        report.add("rows", f"meta.parquet lists {first_row} rows, the certificate {certificate.num_out}")
    for entry in certificate.files:
        if not entry.path.startswith("part-") or entry.path not in whole:
            continue
        with pq.ParquetFile(pa.BufferReader(read_bytes(join(uri, entry.path)))) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            if sizes != groups.get(entry.path) or sum(sizes) != entry.rows:
                report.add("meta", f"{entry.path} has groups {sizes}, meta {groups.get(entry.path)}")
            if sizes and sizes != group_sizes(sum(sizes), sizes[0]):
                report.add("meta", f"{entry.path} has uneven row groups {sizes}")
            try:
                check_table(file.schema_arrow, PROMPTS, entry.path)
            except ValueError as error:
                report.add("schema", str(error))


def check_rejected(uri: str, certificate: Certificate, whole: set[str], report: Report) -> None:
    """The rejected rows are those that the certificate counts."""
    if REJECTED_FILE not in whole:
        return
    table = pq.read_table(pa.BufferReader(read_bytes(join(uri, REJECTED_FILE))))
    try:
        check_table(table.schema, REJECTED, REJECTED_FILE)
    except ValueError as error:
        report.add("schema", str(error))
        return
    counted = dict(Counter(table["status"].to_pylist()))
    if counted != {**certificate.filtered, **certificate.dead}:
        report.add("rows", f"rejected.parquet holds {counted}, the certificate {certificate.filtered}")


def read_rows(uri: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a shard, one row group in memory at a time."""
    with pq.ParquetFile(pa.BufferReader(read_bytes(join(uri, name)))) as file:
        if [f for f in PROMPTS.names if f not in file.schema_arrow.names]:
            return  # told already as a wrong schema
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group).to_pylist()
