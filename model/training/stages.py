"""The two stages as values: what stage 1 and stage 2 share, and the little in which they differ.

Stage 1 learns from retrieval-augmented prompts (VIMI figure 1); stage 2 finetunes that model on a mixture
of three instruction tasks (figure 2). VIMI prints neither batch sizes nor steps nor learning rates: where
a default comes from is said at each field.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from infra.cluster import RayConfig
from infra.config import Config
from model.data.batch import TASKS
from model.data.inputs import InputConfig
from model.training.parallel import ParallelConfig
from model.training.telemetry import LogConfig


class OptimConfig(Config):
    """The optimizer and its schedule, counted in samples."""

    name: Literal["lamb", "adamw", "muon"] = "lamb"
    """Snap Video trains with LAMB (2402.14797, section 4.1). Muon for the blocks' matrices with AdamW for the
    rest learns small models sooner (`model.muon`); its state is smaller, its step dearer."""
    lr: float = Field(default=5e-3, gt=0)
    """Peak learning rate: 5e-3 for LAMB (Snap Video); 1e-4 is its Adam baselines'. Muon's updates have AdamW's
    size."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Snap Video."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Snap Video."""
    warmup_samples: int = Field(default=10_000 * 4096, ge=0)
    """Linear warm-up; 10,000 steps of 4,096 samples (Snap Video). Capped at a tenth of the run."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; Snap Video clips and doesn't print its value, so 1.0 is ours."""


class EmaConfig(Config):
    """Moving averages of the weights that are kept beside them."""

    half_life_samples: tuple[int, ...] = (6_000 * 4096,)
    """Classic averages; Snap Video's half-life is 6,000 steps of 4,096 samples. Capped at a tenth of the
    run, so that a short run's average is not its start."""
    sigma_rel: tuple[float, ...] = (0.05, 0.10)
    """Power-function averages (EDM2, 2312.02696: the two widths from which others are reconstructed)."""


class ValidationConfig(Config):
    """Loss on a fixed grid: sigma quantile x retrieval on/off x medium, noise by sample id."""

    every_samples: int | None = Field(default=None, ge=1)
    """Samples between two validations; None = with each checkpoint."""
    num_samples: int = Field(default=16, ge=0)
    """Rows of each medium; 0 switches validation off."""
    held_out_frac: float = Field(default=0.01, ge=0, lt=1)
    """Share of the parent videos whose clips are kept from training, chosen by the hash of the parent, so
    that both stages keep the same ones back. Rows of a val or test split always are. A hundredth (ours) is
    plenty for `num_samples` of a large corpus and nothing of a small one: where no row was kept back,
    validation reads training rows, and each record says so (`val/held_out` 0)."""
    quantiles: tuple[float, ...] = (0.1, 0.35, 0.65, 0.9)
    """Quantiles of the training's distribution of noise levels."""


class PreviewConfig(Config):
    """Videos sampled while training: the same prompts and noise each time, so that they can be compared."""

    num_videos: int = Field(default=4, ge=0)
    """Videos each time, from the rows that validation reads; 0 switches them off."""
    every_samples: int | None = Field(default=None, ge=1)
    """Samples between two times; None = only at the end."""
    num_steps: int = Field(default=64, ge=1)
    """Sampling steps; Snap Video's base model is good from 64."""
    guidance_weight: float = 4.0
    """Of classifier-free guidance; 4 is ours, as in `vimi-train sample`."""
    ema: str = "weights"
    """`weights`, or the name of an average (power-0.05, half-life-...)."""


class CheckpointConfig(Config):
    every_samples: int = Field(default=4_000, ge=1)
    """Samples between two checkpoints, rounded up to whole steps; the last step always writes one."""
    num_to_keep: int | None = Field(default=3, ge=1)
    """Newest checkpoints that stay; None = all (post-hoc EMA needs many)."""
    in_background: bool = True
    """Write while training goes on; it waits only for the copy."""


class UpsamplerConfig(Config):
    """Second stage of the cascade: the small video, noised a little, is part of the input."""

    small_height_px: int = Field(default=36, ge=1)
    """Height of the small video, pixels: the base model's; 36 (Snap Video)."""
    small_width_px: int = Field(default=64, ge=1)
    """Width of the small video, pixels; 64 (Snap Video)."""
    max_level: float = Field(default=1.0, gt=0)
    """Noise on the small video in training: its standard deviation is uniform in [0, this]. Snap Video says
    "random level" and no more; 1, as much noise as signal, is ours."""
    start_from: str | None = None
    """Run of a base model, or one of its checkpoints, whose weights the upsampler starts with (as Snap
    Video); None = freshly drawn."""
    start_ema: str | None = None
    """Average of it to start with (its name in the checkpoint); None = the weights."""

    @property
    def small_size_px(self) -> tuple[int, int]:
        """(height, width) of the small video."""
        return self.small_height_px, self.small_width_px


class StageConfig(InputConfig):
    """What both stages share."""

    stage: ClassVar[str] = "stage1"
    out: str
    """Folder or URI of the run."""
    samples: int = Field(default=550_000 * 4096, ge=1)
    """Training length in samples; Snap Video's base model: 550,000 steps of 4,096."""
    batch_size: int = Field(default=4096, ge=1)
    """Samples of an optimizer step over all workers; Snap Video: 2,048 videos + 2,048 images."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches of a step, one after the other; the result stays the same but for rounding."""
    preset: str = "fit-500m"
    """Backbone by name (model/generator.py). Which FIT VIMI used is not stated."""
    backbone: dict[str, Any] = Field(default_factory=dict)
    """Fields of the preset's config to change, e.g. {"num_blocks": 4}."""
    references: Literal["faithful", "plus"] = "faithful"
    """faithful: reference pictures are read through the frozen encoder only, as VIMI's figures show; plus:
    the generator also reads their pixel patches."""
    encodings: str | None = None
    """Folder that `vimi-data encode` made of these prompts for this config: read in place of running the frozen
    encoders, to the same losses. None = encode every sample when it is drawn."""
    upsampler: UpsamplerConfig | None = None
    """Train the second stage of the cascade instead of a base model; None = a base model."""
    self_condition_rate: float = Field(default=0.9, ge=0, le=1)
    """Share of samples that get latents of a first pass; 0.9 (Snap Video, table 8)."""
    sigma_data: float = Field(default=1.0, gt=0)
    """Assumed standard deviation of the data; 1 (Snap Video, whose ablation prefers it to 0.5). Pixels of real
    clips measure about 0.5, and runs of minutes learn sooner with that (`bench_quality`)."""
    noise_log_mean: float = -1.2
    """Mean of ln sigma in training; -1.2 (EDM table 1, unaltered in Snap Video). A short run that can't afford
    millions of samples learns the layout first with more noise, e.g. 0."""
    noise_log_std: float = Field(default=1.2, gt=0)
    """Standard deviation of ln sigma in training; 1.2 (EDM table 1)."""
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    validation: ValidationConfig = ValidationConfig()
    preview: PreviewConfig = PreviewConfig()
    observe: Literal["auto", "inline", "spare", "background"] = "auto"
    """Where validation and previews run. inline: in the loop, which waits. spare: a Ray task on a CPU (or
    GPU, where training has GPUs) beside the workers'; training doesn't wait. background: a Ray task that
    reserves nothing and has the lowest priority, on a CPU. auto: spare if there is one, else inline."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    loader_threads: int = Field(default=2, ge=1)
    """Threads a rank that read and decode; PyAV and pyarrow release the GIL."""
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    ray: RayConfig = RayConfig()
    num_workers: int | tuple[int, int] | None = None
    """Training processes, from 1; None = one per GPU of the session, 1 without GPUs. A range (`[1, 8]`, on the
    command line `1-8`) takes what the cluster has and changes with it (Ray Train's elasticity); ranks may
    then differ by one sample a micro-batch. Any number continues the same run with the same samples."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs that Ray reserves for a worker, and its threads; None = an equal share of all."""
    max_failures: int = Field(default=3, ge=-1)
    """Restarts from the last checkpoint after a worker or node dies; -1 = no limit."""
    spare_workers: bool = True
    """Keep, for each worker, an idle process that has imported what a worker needs (from half a minute into
    the run; 0.8 GB resident, much of it shared): a worker that dies is then replaced in seconds."""
    seed: int = 0

    @field_validator("num_workers", mode="before")
    @classmethod
    def _range_in_words(cls, value: Any) -> Any:
        low, dash, high = value.partition("-") if isinstance(value, str) else ("", "", "")
        if dash and low.isdigit() and high.isdigit():
            return int(low), int(high)
        return value

    @field_validator("num_workers")
    @classmethod
    def _workers_from_one(cls, value: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        low, high = value if isinstance(value, tuple) else (value, value)
        if low is not None and high is not None and not 1 <= low <= high:
            raise ValueError(f"{value}; legal: a number from 1, or a range like [1, 8]")
        return value

    @model_validator(mode="after")
    def _batch_divides(self) -> "StageConfig":
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}"
            )
        return self

    @model_validator(mode="after")
    def _upsampler_enlarges(self) -> "StageConfig":
        small = self.upsampler
        if small is None:
            return self
        if self.autoencoder is not None:
            raise ValueError("an upsampler works in pixels; legal: no autoencoder with it")
        if any(b.height_px or b.width_px for b in self.buckets):
            raise ValueError("an upsampler has one size; legal: buckets without height_px and width_px with it")
        if small.small_height_px >= self.height_px or small.small_width_px >= self.width_px:
            raise ValueError(
                f"an upsampler from {small.small_height_px} x {small.small_width_px} to {self.height_px} x "
                f"{self.width_px} pixels; legal: height_px and width_px above the small video's"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Samples of a micro-batch over all workers."""
        return self.batch_size // self.accumulation

    @property
    def num_steps(self) -> int:
        """Optimizer steps: the samples, rounded up to whole steps."""
        return -(-self.samples // self.batch_size)

    @property
    def task_weights(self) -> dict[str, float] | None:
        """Share of samples of each task; None = as the shards hold them."""
        return None

    @property
    def total_samples(self) -> int:
        """Samples of all steps."""
        return self.num_steps * self.batch_size


class Stage1Config(StageConfig):
    """Pretraining on retrieval-augmented prompts."""


class Stage2Config(StageConfig):
    """Instruction tuning: finetunes a stage-1 run on a mixture of tasks."""

    stage: ClassVar[str] = "stage2"
    start_from: str
    """Run folder of stage 1, or one of its checkpoints."""
    start_ema: str | None = None
    """EMA of it to start from (its name in the checkpoint, e.g. power-0.05); None = the weights."""
    tasks: dict[str, float] | None = Field(default_factory=lambda: {task.value: 1.0 for task in TASKS})
    """Share of samples of each task. VIMI names these three and prints no proportions, so equal shares are
    ours; null takes the shards' own."""
    samples: int = Field(default=200_000 * 3072, ge=1)
    """UNIMO-G's second stage (2401.13388), the nearest recipe in print: 200,000 steps of 3,072."""
    batch_size: int = Field(default=3072, ge=1)
    """UNIMO-G's second stage."""
    optim: OptimConfig = OptimConfig(lr=1e-3)
    """A fifth of stage 1's learning rate: the ratio of UNIMO-G's stages (5e-5 to 1e-5)."""

    @property
    def task_weights(self) -> dict[str, float] | None:
        return self.tasks


SPEED_ONLY = {
    "loader_threads", "parallel", "log", "max_failures", "checkpoint", "preview", "observe", "cpus_per_worker",
    "encodings", "spare_workers",
}  # fmt: skip
"""Fields that may differ when a run is continued: where and how fast, not what."""


def config_class(stage: str) -> type[Stage1Config] | type[Stage2Config]:
    return Stage2Config if stage == "stage2" else Stage1Config
