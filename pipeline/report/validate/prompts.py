"""One prompt: ids, order of segments, ranks, pictures, target."""

import io
import warnings
from typing import Any

from pipeline.report.validate.findings import Report, ValidateConfig
from pipeline.schema import Role, RowError, TargetKind, Task, prompt_id


def check_prompt(row: dict[str, Any], where: str, config: ValidateConfig, report: Report) -> None:
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
            if (wrong := picture_problem(segment["image"], config.max_picture_px)) is not None:
                report.add("pictures", f"{where}: {wrong}")
        if segment["role"] == Role.RETRIEVED and segment["document"] is not None:
            documents.setdefault(segment["document"]["rank"], segment["document"]["doc_id"])
    if list(documents) != list(range(1, len(documents) + 1)) or len(documents) != row["num_documents"]:
        report.add("segments", f"{where}: ranks {list(documents)} of {row['num_documents']} documents")
    if len(set(documents.values())) != len(documents):
        report.add("segments", f"{where}: a document stands twice")


def picture_problem(data: bytes | None, max_px: int) -> str | None:
    """What is wrong with an encoded picture; None = it decodes whole and is of bounded size."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(data or b"")) as image:
                if max(image.size) > max_px:
                    return f"picture of {image.width}x{image.height} pixels"
                image.load()
    except Exception as error:  # noqa: BLE001 - the row boundary: decoders raise anything on bad bytes
        return f"picture can't be decoded: {type(error).__name__}: {error}"
    return None


def check_target(row: dict[str, Any], where: str, report: Report) -> None:
    """A target decodes to what its row says."""
    from pipeline.media.frames import probe

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
