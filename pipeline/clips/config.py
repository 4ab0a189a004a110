"""What `vimi-data crawl` may be told."""

from pydantic import Field

from infra.cluster import RayConfig
from infra.config import Config
from infra.storage import absolute, join
from pipeline.clips.fetch.config import FetchConfig
from pipeline.clips.filters import FilterConfig
from pipeline.clips.shots import ShotConfig
from pipeline.clips.sources import SourceConfig


class CrawlConfig(Config):
    """A crawl of one or more corpora into one table of clips."""

    sources: tuple[SourceConfig, ...]
    """The corpora, in the order of the output."""
    out: str
    """Output folder."""
    shots: ShotConfig = ShotConfig()
    filters: FilterConfig = FilterConfig()
    fetch: FetchConfig = FetchConfig()
    media: str | None = None
    """Folder of fetched bytes; None = `media` below `out`. Crawls that share one transfer only what
    has changed since (ETag, Last-Modified)."""
    transcode: bool = False
    """Also write each good clip as a file of its own, `standalone/<clip_id>.mp4` (pictures only)."""
    max_failed_frac: float = Field(default=0.5, ge=0, le=1)
    """Ceiling on dead rows (filtered ones don't count), as a share of all rows. Ours."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Time that one parent may take to be hashed, decoded and judged; then it is a row `timeout`."""
    memory_bytes: int = Field(default=4 << 30, ge=1 << 28)
    """Heap of the process that decodes; a file that wants more is a row, not a dead worker."""
    rows_per_part: int = Field(default=50_000, ge=1)
    """Rows of one output file."""
    ray: RayConfig = RayConfig()
    num_workers: int | None = Field(default=None, ge=1)
    """Workers at once; None = as many as the CPUs allow."""

    @property
    def media_folder(self) -> str:
        return absolute(self.media) if self.media else join(self.out, "media")
