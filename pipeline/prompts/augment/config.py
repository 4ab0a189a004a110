"""Config of `vimi-data augment`."""

from typing import Any, Literal

from pydantic import Field, field_validator

from infra.clip import ClipConfig
from infra.config import Incidental, Location
from pipeline.job import JobConfig
from pipeline.memory.retrieve import RetrieveConfig
from pipeline.prompts.augment.target import TargetConfig
from pipeline.prompts.guard import GuardConfig


class AugmentConfig(JobConfig):
    """Captions x memory -> multimodal prompts."""

    clips: Incidental[tuple[Location, ...]]
    """Folders made by `vimi-data crawl`: the clips to train on. One folder may be given as a string."""
    memory: Incidental[Location]
    """Folder made by `vimi-data build-index`."""
    memory_version: str | None = None
    """Tag of an older version of the memory; None = the one that is certified."""
    retrieve: RetrieveConfig = RetrieveConfig()
    guard: GuardConfig = GuardConfig()
    target: TargetConfig = TargetConfig()
    clip: Incidental[ClipConfig | None] = None
    """CLIP for clips and captions that the memory holds no vectors of; None = the memory's own, by name.
    Must be the memory's. Loaded only where a vector is missing."""
    vectors: Literal["all", "stored"] = "all"
    """all = clips that are not in the memory are embedded too, for the guard and for `clip_similarity`;
    stored = only vectors that the memory holds are used: quicker, and such clips are guarded by
    perceptual hash and source alone."""
    shard_rows: int = Field(default=256, ge=1, le=65536)
    """Clips of one shard, which is also the unit of work: what a kill loses at most, for each worker.
    Ours: about 50 MB with frames and five pictures a row."""
    row_group_rows: int = Field(default=32, ge=1, le=65536)
    """Rows of one row group, the trainer's unit of reading and shuffling. Ours: about 6 MB."""
    max_failed_frac: Incidental[float] = Field(default=0.1, ge=0, le=1)
    """The job fails when more than this share of the clips can't become prompts. Ours."""

    @field_validator("clips", mode="before")
    @classmethod
    def _one_folder_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("clips")
    @classmethod
    def _some_clips(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("give at least one folder made by `vimi-data crawl`")
        return value
