"""One unit of work: a run of row groups in, one shard of instructions and a receipt out."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from PIL import Image

from infra.storage import join
from pipeline.job import Receipt
from pipeline.media.row_frames import first_frame, read_frames
from pipeline.prompts.instruct import tasks
from pipeline.prompts.instruct.config import InstructConfig, draw_tasks, generator
from pipeline.prompts.subjects.cutout import encode, fit_inside
from pipeline.prompts.subjects.extract import SubjectFinder
from pipeline.schema import PROMPTS, Media, Role, RowError, Status, Task, prompt_id
from pipeline.shards import ShardSet, shard_name, write_shard


def make_worker(
    config: InstructConfig, config_hash: str, prompts: str, out: str
) -> Callable[[dict[str, Any]], Receipt]:
    """The function that a worker process runs for each unit."""
    return Instructor(config, config_hash, ShardSet(prompts), out)


class Instructor:
    """Turns a run of row groups into one shard of instructions and a receipt."""

    def __init__(self, config: InstructConfig, config_hash: str, shards: ShardSet, out: str) -> None:
        self.config, self.shards, self.out = config, shards, out
        self.config_hash = config_hash
        self.finder = SubjectFinder(config.subjects) if Task.SUBJECT_DRIVEN in config.tasks else None

    def __call__(self, payload: dict[str, Any]) -> Receipt:
        made: list[dict[str, Any]] = []
        rejected: list[dict[str, Any]] = []
        for group in payload["row_groups"]:
            for row in self.shards.read_row_group(group).to_pylist():
                for task in draw_tasks(self.config, row["clip_id"]):
                    result = self.instruct(row, task, payload["local"].get(row["clip_id"]))
                    (made if "prompt_id" in result else rejected).append(result)
        entry = None
        if made:
            place = join(self.out, shard_name(payload["number"]))
            entry = write_shard(place, made, PROMPTS, row_group_rows=self.config.row_group_rows).model_dump()
        return {"entry": entry, "rejected": rejected, "counts": _count(made), "notes": _notes(rejected)}

    def instruct(self, row: dict[str, Any], task: Task, local_uri: str | None) -> dict[str, Any]:
        """One draw: a row of PROMPTS, or a row of REJECTED."""
        try:
            segments, flags = self._segments(row, task, local_uri)
        except RowError as error:
            return _reject(row, task, error.status, str(error))
        except Exception as error:  # noqa: BLE001 - the row boundary: one bad row must not stop the job
            return _reject(row, task, Status.BAD_ROW, f"{type(error).__name__}: {error}")
        documents = sum(s["role"] == Role.RETRIEVED and s["type"] == "image" for s in segments)
        return {
            **row,
            "prompt_id": prompt_id(task, row["clip_id"], self.config_hash),
            "task": task.value,
            "segments": segments,
            "num_documents": documents,
            "flags": [*(row["flags"] or []), *flags] if task is Task.TEXT_TO_VIDEO else flags,
            "config_hash": self.config_hash,
        }

    def _segments(
        self, row: dict[str, Any], task: Task, local_uri: str | None
    ) -> tuple[list[tasks.Segment], list[str]]:
        caption = row["caption"]
        if task is Task.TEXT_TO_VIDEO:
            retrieved = [s for s in row["segments"] or [] if s["role"] == Role.RETRIEVED]
            if not retrieved:
                raise RowError(Status.FILTERED_NO_DOCUMENT, "no retrieved document")
            return tasks.text_to_video(caption, retrieved), []
        if task is Task.VIDEO_PREDICTION:
            if row["media"] == Media.IMAGE:
                raise RowError(Status.FILTERED_NOT_VIDEO, "a picture has no next frame")
            first = first_frame(row, local_uri=local_uri)
            picture = fit_inside(Image.fromarray(first.frames[0]), self.config.first_frame_px)
            data = encode(picture, self.config.subjects.picture_format)
            return tasks.video_prediction(caption, data), _frame_flags(first.from_target)
        assert self.finder is not None
        found = read_frames(row, self.config.subjects.frame_fracs, local_uri=local_uri)
        random = generator(self.config.seed, row["clip_id"], "subject")
        pictures = self.finder.find(caption, list(found.frames), random)
        if isinstance(pictures, str):
            raise RowError(Status.FILTERED_NO_SUBJECT, pictures)
        return tasks.subject_driven(caption, pictures), _frame_flags(found.from_target)


def _frame_flags(from_target: bool) -> list[str]:
    return ["frames_from_target"] if from_target else []


def _reject(row: dict[str, Any], task: Task, status: Status, reason: str) -> dict[str, Any]:
    values = {"row_id": row["clip_id"], "source_uri": row["source_uri"], "status": status.value}
    return {**values, "error": f"{task.value}: {reason}"}


def _count(made: list[dict[str, Any]]) -> dict[str, int]:
    """Facts of a shard: rows by task, pictures by role, flags."""
    counts = Counter(f"task.{row['task']}" for row in made)
    counts.update(f"flag.{flag}" for row in made for flag in row["flags"])
    counts.update(f"picture.{s['role']}" for row in made for s in row["segments"] if s["type"] == "image")
    return dict(counts)


def _notes(rejected: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["status"] for row in rejected))
