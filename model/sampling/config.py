"""What `vimi-train sample` may be told."""

from typing import Literal

from pydantic import Field

from infra.config import Config

WEIGHTS = "weights"


class GuidanceConfig(Config):
    """How estimates with and without parts of the prompt are combined (model/guidance.py)."""

    scheme: Literal["none", "cfg", "retrieval", "alchemist", "phantom"] = "cfg"
    """cfg: classifier-free guidance, as Snap Video; the others weigh text and pictures apart."""
    weight: float = 4.0
    """1 = no guidance (cfg). Snap Video sweeps 0 to 16 and does not state its choice; 4 is ours."""
    image_weight: float = 1.0
    """Of the pictures, in schemes that weigh them apart."""
    threshold: float | None = Field(default=0.995, gt=0, le=1)
    """Quantile of dynamic thresholding, which Snap Video uses; 0.995 is Imagen's. null = off, and always
    off in latents, which have no bounds."""
    oscillate_from: int | None = None
    """Step from which the weight oscillates with 1, which Snap Video does; null = constant."""


class UpsampleConfig(Config):
    """The cascade's second stage."""

    run: str
    """Folder of an upsampler's run, or one of its checkpoints."""
    ema: str = WEIGHTS
    """As in the base model's config."""
    num_steps: int = Field(default=40, ge=1)
    """Sampling steps; 40 (Snap Video)."""
    level: float = Field(default=0.1, ge=0)
    """Noise put on the small video, which hides what the base model got wrong. Snap Video searches it and
    prints no value; 0.1 is ours."""
    guidance: GuidanceConfig = GuidanceConfig()


class SampleConfig(Config):
    """What to sample. Prompts come from `prompts`, `prompts_file` and `prompts_uri`, one after another."""

    run: str
    """Folder of a stage1 or stage2 run, or one of its checkpoints."""
    out: str
    """Folder or URI of the videos."""
    prompts: tuple[str, ...] = ()
    """Prompts in words; `<image>` marks the place of a picture."""
    images: tuple[str, ...] = ()
    """Pictures for the placeholders of all `prompts`, in order: `path`, or `role:path` with role subject,
    background, first_frame or retrieved."""
    prompts_file: str | None = None
    """JSONL file of prompts (model/sampling/ask.py)."""
    prompts_uri: str | None = None
    """Folder of prompt shards: their documents and pictures come with them."""
    rows: int = Field(default=4, ge=1)
    """How many prompts of `prompts_uri`."""
    num_documents: int | None = Field(default=None, ge=0)
    """Retrieved documents that stay in each prompt; null = all."""
    ema: str = WEIGHTS
    """`weights`, a stored average by name (power-0.05, half-life-...), or `power-<sigma_rel>` of any width,
    reconstructed from the stored ones (EDM2)."""
    seeds: tuple[int, ...] = (0,)
    """One video for each prompt and seed."""
    num_steps: int = Field(default=256, ge=1)
    """Sampling steps; 256 (Snap Video's base model; good from 64)."""
    guidance: GuidanceConfig = GuidanceConfig()
    fps: float = Field(default=24.0, gt=0)
    """Frame rate to condition on and to write, for prompts that don't bring their own; 24 (VIMI)."""
    original_size_px: tuple[int, int] = (288, 512)
    """(height, width) of the original to condition on, likewise; VIMI's output size."""
    num_frames: int | None = Field(default=None, ge=1)
    """Frames; null = as trained."""
    size_px: tuple[int, int] | None = None
    """(height, width) of the base model's video: of a bucket that it was trained on; null = its main size."""
    upsampler: UpsampleConfig | None = None
    """Second stage of the cascade, which enlarges each video; null = the base model's size."""
