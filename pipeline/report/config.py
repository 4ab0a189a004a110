"""What `vimi-data report` may be told."""

from pydantic import Field

from infra.config import Config


class ReportConfig(Config):
    """Which outputs go on the page, and how large it may be."""

    out: str
    """The HTML file to write, or a folder (then `report.html` in it)."""
    clips: str | None = None
    """Output folder of `vimi-data crawl`."""
    memory: str | None = None
    """Output folder of `vimi-data build-index`."""
    prompts: str | None = None
    """Output folder of `vimi-data augment`."""
    instructions: str | None = None
    """Output folder of `vimi-data instruct`."""
    runs: tuple[str, ...] = ()
    """Run folders of `vimi-train stage1` and `stage2`, in this order; unfinished ones too."""
    samples: tuple[str, ...] = ()
    """Output folders of `vimi-train sample`."""
    title: str = "From corpus to video"
    """Headline of the page."""
    num_clips: int = Field(default=12, ge=0, le=200)
    """Clips shown as filmstrips."""
    num_prompts: int = Field(default=8, ge=0, le=200)
    """Multimodal prompts shown."""
    num_instructions: int = Field(default=4, ge=0, le=100)
    """Instructions shown of each task."""
    num_samples: int = Field(default=12, ge=0, le=200)
    """Sampled videos shown of each folder."""
    max_bytes: int = Field(default=15_000_000, ge=200_000)
    """Size of the page, bytes: pictures that would exceed it are left out, and the page says so.
    15 MB: what most mail servers let through."""
    max_rows: int = Field(default=200_000, ge=100)
    """Rows read for the distributions; more are sampled evenly, by row group."""
    seed: int = 0
    """Of the random pairs that the similarities are compared with."""
