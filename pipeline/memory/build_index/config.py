"""Which tables become which memory."""

from pydantic import Field

from infra.clip import ClipConfig
from infra.cluster import RayConfig
from infra.config import Config
from pipeline.memory.config import IndexConfig
from pipeline.memory.dedup import DedupConfig
from pipeline.memory.embed import EmbedConfig

JOB, BUILD, MEASURED, DUPLICATES = "build-index", "build", "measured.json", "duplicates.parquet"


class BuildIndexConfig(Config):
    """Which tables become which memory."""

    clips: tuple[str, ...]
    """Folders made by `vimi-data crawl`: videos and pictures with captions."""
    out: str
    """Folder of the memory."""
    grow: bool = False
    """Add to the memory that is in `out`: what it holds already is neither read nor embedded again."""
    clip: ClipConfig = ClipConfig()
    """The CLIP that embeds pictures and texts."""
    embed: EmbedConfig = EmbedConfig()
    """From a clip to a document."""
    dedup: DedupConfig = DedupConfig()
    """Duplicates among the documents."""
    index: IndexConfig = IndexConfig()
    """From vectors to a search with a declared recall."""
    rows_per_unit: int = Field(default=256, ge=1, le=65536)
    """Clips of one unit of work: what a kill loses at most, for each worker. Ours."""
    max_failed_frac: float = Field(default=0.1, ge=0, le=1)
    """The job fails when more than this share of the good clips can't become documents. Ours."""
    seed: int = 0
    """Of the sample that verifies the recall."""
    ray: RayConfig = RayConfig()
    num_workers: int | None = Field(default=None, ge=1)
    """Embedding workers; None = one a GPU, or one for every 8 CPUs."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each worker, which decode beside the model; None = its share of the CPUs, at most 8."""


FREE = {"clips", "grow", "max_failed_frac", "threads"}
"""Fields that may differ when the same command is given again or the memory grows."""
