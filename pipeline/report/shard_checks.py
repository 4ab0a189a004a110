"""Checks of prompt shards: files as certified, row counts, schemas, ids, segments, pictures, targets."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.certificate import Certificate
from infra.pictures import PictureError, decode_picture, open_picture
from infra.storage import exists, join, list_files, read_bytes, sha256_file, size_bytes
from pipeline.media.frames import probe
from pipeline.schema import PROMPTS, REJECTED, Role, RowError, TargetKind, Task, check_table, prompt_id
from pipeline.shards import REJECTED_FILE, ShardSet, group_sizes, is_shard

MAX_PICTURE_PX = 4096
"""A picture with a longer side breaks the bound. Ours."""
MAX_PROBLEMS = 20
"""Problems of one kind that are told in full; all are counted. Ours."""


@dataclass
class Report:
    """What was checked, and what was found wrong."""

    checked: Counter[str] = field(default_factory=Counter)
    """What was looked at -> how many."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Kind -> the first few, in words."""
    counts: Counter[str] = field(default_factory=Counter)
    """Kind -> all."""

    @property
    def is_valid(self) -> bool:
        return not self.counts

    def add(self, kind: str, words: str) -> None:
        self.counts[kind] += 1
        told = self.problems.setdefault(kind, [])
        if len(told) < MAX_PROBLEMS:
            told.append(words)

    def lines(self) -> list[str]:
        """For a terminal: what was proved, then what was not."""
        found = [f"checked {count:,} {what}" for what, count in self.checked.items()]
        for kind, told in self.problems.items():
            found.append(f"{kind}: {self.counts[kind]:,}")
            found += [f"  {words}" for words in told]
        return [*found, "valid" if self.is_valid else f"NOT valid: {sum(self.counts.values()):,} problems"]


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
        if not is_shard(entry.path) or entry.path not in whole:
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


def read_rows(uri: str, name: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a shard, or some of their columns, one row group in memory at a time."""
    with pq.ParquetFile(pa.BufferReader(read_bytes(join(uri, name)))) as file:
        if [f for f in PROMPTS.names if f not in file.schema_arrow.names]:
            return  # told already as a wrong schema
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns).to_pylist()


def check_prompt(row: dict[str, Any], where: str, report: Report) -> None:
    """One row: ids, order of segments, ranks, pictures."""
    roles = {role.value for role in Role}
    if row["task"] not in {task.value for task in Task}:
        report.add("rows", f"{where}: unknown task {row['task']!r}")
    elif row["task"] == Task.PRETRAIN:
        if row["prompt_id"] != prompt_id(Task.PRETRAIN, row["clip_id"], row["config_hash"]):
            report.add("ids", f"{where}: not the hash of its content")
        last = (row["segments"] or [{}])[-1]
        if (last.get("role"), last.get("text")) != (Role.CAPTION.value, row["caption"]):
            report.add("segments", f"{where}: the caption is not the last segment")
    documents: dict[int, str] = {}
    for segment in row["segments"] or []:
        if segment["role"] not in roles or segment["type"] not in ("text", "image"):
            report.add("segments", f"{where}: {segment['type']} {segment['role']}")
        if segment["type"] == "image":
            report.checked["pictures"] += 1
            if (wrong := _picture_problem(segment["image"])) is not None:
                report.add("pictures", f"{where}: {wrong}")
        if segment["role"] == Role.RETRIEVED and segment["document"] is not None:
            documents.setdefault(segment["document"]["rank"], segment["document"]["doc_id"])
    if list(documents) != list(range(1, len(documents) + 1)) or len(documents) != row["num_documents"]:
        report.add("segments", f"{where}: ranks {list(documents)} of {row['num_documents']} documents")
    if len(set(documents.values())) != len(documents):
        report.add("segments", f"{where}: a document stands twice")


def _picture_problem(data: bytes | None) -> str | None:
    """What is wrong with an encoded picture; None = it decodes whole and is of bounded size."""
    try:
        image = open_picture(data or b"")
        if max(image.size) > MAX_PICTURE_PX:
            return f"picture of {image.width}x{image.height} pixels"
        decode_picture(image)
    except PictureError as error:
        return f"picture can't be decoded: {error}"
    return None


def check_target(row: dict[str, Any], where: str, report: Report) -> None:
    """A target decodes to what its row says."""
    target = row["target"] or {}
    report.checked["targets"] += 1
    kind, data = target.get("kind"), target.get("data")
    if kind == TargetKind.FRAMES:
        size = target["num_frames"] * target["height_px"] * target["width_px"] * 3
        if len(data or b"") != size:
            report.add("targets", f"{where}: {len(data or b''):,} bytes, expected {size:,}")
        elif not (target["fps"] or 0) > 0:
            report.add("targets", f"{where}: {target['fps']} frames per second")
    elif kind == TargetKind.VIDEO:
        try:
            info = probe(data or b"")
            if (info.height_px, info.width_px) != (target["height_px"], target["width_px"]):
                report.add("targets", f"{where}: {info.width_px}x{info.height_px} pixels inside")
        except RowError as error:
            report.add("targets", f"{where}: {error}")
    elif kind != TargetKind.REFERENCE:
        report.add("targets", f"{where}: unknown kind {kind!r}")
