"""What `vimi-data instruct` needs, and who is drawn for which task."""

import hashlib
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from infra.config import Incidental, Location
from pipeline.job import JobConfig
from pipeline.prompts.subjects.extract import SubjectConfig
from pipeline.schema import Task

JOB = "instruct"
TASKS = (Task.SUBJECT_DRIVEN, Task.VIDEO_PREDICTION, Task.TEXT_TO_VIDEO)


class InstructConfig(JobConfig):
    """What `vimi-data instruct` needs."""

    prompts: Incidental[Location]
    """Output folder of `vimi-data augment`: captions, retrieved documents, targets."""
    clips: Incidental[Location | None] = None
    """Output folder of `vimi-data crawl`; needed only where the sources were fetched from URLs, to find
    the fetched bytes."""
    tasks: tuple[Task, ...] = TASKS
    """Tasks to make, of the paper's three."""
    draw: Literal["all", "one"] = "all"
    """`all`: every clip serves every task that it can; `one`: each clip serves one task, drawn by
    `proportions`. VIMI's proportions are not published."""
    proportions: dict[Task, float] = Field(default_factory=dict)
    """Weight of each task for `one`; a task that is not named weighs 1. Kosmos-G mixes its sources 2:2:1."""
    subjects: SubjectConfig = SubjectConfig()
    """How words become pictures."""
    first_frame_px: int = Field(default=336, ge=16, le=4096)
    """Longer side of the first frame given to the encoder, pixels. 336: as the subjects' pictures."""
    unit_rows: int = Field(default=64, ge=1)
    """About how many prompts make one unit of work and one output shard: what a kill loses at most, for
    each worker. Ours: about 30 MB with all three tasks; give 1,024 for corpora of many millions."""
    row_group_rows: int = Field(default=64, ge=1)
    """Rows of an output row group: the trainer's unit of reading."""
    seed: int = 0
    """Of all draws; each is a function of (seed, clip id)."""
    max_failed_frac: Incidental[float] = Field(default=0.5, ge=0, le=1)
    """Greatest share of draws that may die (unreadable sources) before the job fails."""

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: tuple[Task, ...]) -> tuple[Task, ...]:
        if not value or Task.PRETRAIN in value or len(set(value)) < len(value):
            raise ValueError(f"give each task once; legal: {', '.join(TASKS)}")
        return value

    @field_validator("proportions")
    @classmethod
    def _positive(cls, value: dict[Task, float]) -> dict[Task, float]:
        if any(not 0 <= weight < float("inf") for weight in value.values()):
            raise ValueError("weights are finite and not negative")
        return value


def generator(seed: int, clip_id: str, stream: str) -> np.random.Generator:
    """Randomness of one clip: the same on every machine, whatever else the job holds."""
    digest = hashlib.sha256(f"{seed}/{clip_id}/{stream}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def draw_tasks(config: InstructConfig, clip_id: str) -> list[Task]:
    """The tasks that this clip is drawn for, in the config's order."""
    if config.draw == "all":
        return list(config.tasks)
    steps = np.cumsum(weights(config))
    place = generator(config.seed, clip_id, "task").random() * steps[-1]
    return [config.tasks[int(np.searchsorted(steps, place, side="right"))]]


def weights(config: InstructConfig) -> list[float]:
    return [config.proportions.get(task, 1.0) for task in config.tasks]
