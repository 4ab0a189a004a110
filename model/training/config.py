"""Configs of the two stages: what stage 1 and stage 2 share, and the little in which they differ.

Stage 1 learns from retrieval-augmented prompts (VIMI figure 1); stage 2 finetunes that model on a mixture
of three instruction tasks (figure 2). VIMI prints neither batch sizes nor steps nor learning rates: where
a default comes from is said at each field.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from infra.cluster import RayConfig
from infra.config import Config, Incidental, Location, refuse_imports
from model.backbones.config import BackboneFields, DiffusersConfig, with_base
from model.data.batch import TASKS
from model.data.inputs import InputConfig
from model.edm import Edm
from model.ema import Profile, make_profile
from model.evaluate.networks import NetworkConfig
from model.optim import OPTIMIZERS
from model.registry import named
from model.training.metrics import TRACKERS

WEIGHTS = "weights"
"""Name of the weights themselves, beside those of their averages."""

NOISE = ("sigma_data", "log_mean", "log_std", "shift", "mean", "std")


def one_of(name: str, legal: Any) -> str:
    """The name, if it is one of the legal ones."""
    if name not in legal:
        raise ValueError(f"{name!r}; legal: {', '.join(legal)}")
    return name


class OptimConfig(Config):
    """The optimizer and its schedule, counted in samples."""

    name: str = "lamb"
    """lamb, adamw, muon, or package.module:function of your own (`model.optim`). Snap Video trains with LAMB
    (2402.14797, section 4.1). Muon for the blocks' matrices with AdamW for the rest learns small models
    sooner; its state is smaller, its step dearer."""
    lr: float = Field(default=5e-3, gt=0, le=10)
    """Peak learning rate: 5e-3 for LAMB (Snap Video); 1e-4 is its Adam baselines'. Muon's updates have AdamW's
    size."""
    weight_decay: float = Field(default=0.01, ge=0, le=100)
    """Snap Video."""
    warmup_samples: int = Field(default=10_000 * 4096, ge=0)
    """Linear warm-up; 10,000 steps of 4,096 samples (Snap Video). Capped at a tenth of the run."""

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        named(OPTIMIZERS, value)
        return value


class ValidationConfig(Config):
    """Loss with each checkpoint, by noise level, documents (right, none, shuffled), medium and task.

    A task is measured with all that its prompts show and with nothing; what the right ones gain has a standard
    error over the rows.
    """

    num_samples: int = Field(default=16, ge=0, le=1_000_000)
    """Rows of each bucket, in stage 2 evenly of its tasks; 0 switches validation off. A row costs up to 12
    forward passes (16 in stage 2): three choices of documents, and nothing shown, at four noise levels each;
    twice as many with self-conditioning. 16 (ours) shows where a run goes; to show that documents help takes
    about a hundred."""
    held_out_frac: float = Field(default=0.01, ge=0, lt=1)
    """Share of the parent videos whose clips are kept from training, chosen by the hash of the parent, so
    that both stages keep the same ones back. Rows of a val or test split always are. A hundredth (ours) is
    plenty for `num_samples` of a large corpus and nothing of a small one: where no row was kept back,
    validation reads training rows, and each record says so (`val/held_out` 0)."""
    metrics: Incidental[tuple[str, ...]] = ()
    """Metrics of sampled videos, as `vimi-train evaluate` has them (fvd, clip_t, ...), against the targets of
    the same rows; in stage 2 also for each task. They go into the records and trackers as score/..."""
    metrics_every_samples: Incidental[int | None] = Field(default=None, ge=1)
    """Samples between two times that they are computed; null = only at the end."""
    metrics_videos: Incidental[int] = Field(default=64, ge=2, le=100_000)
    """Videos that are sampled for them, 64 sampling steps each; their number is part of each score's name."""
    networks: Incidental[dict[str, Any]] = Field(default_factory=dict)
    """Of the metrics: fields of `networks` of `vimi-train evaluate`."""

    @field_validator("networks")
    @classmethod
    def _known_networks(cls, value: dict[str, Any]) -> dict[str, Any]:
        return NetworkConfig.load(options=value).model_dump(mode="json", exclude_unset=True)


class CheckpointConfig(Config):
    """How often a run is saved."""

    every_samples: int = Field(default=4_000, ge=1)
    """Samples between two checkpoints, rounded up to whole steps; the last step always writes one."""
    num_to_keep: int | None = Field(default=3, ge=1)
    """Newest checkpoints that stay; None = all (post-hoc EMA needs many)."""


class ParallelConfig(Config):
    """How the model is spread over the ranks; none of it changes the order of samples."""

    mode: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: a whole copy on each rank. fsdp: FSDP2, parameters and optimizer sharded over all ranks. hsdp:
    sharded over the ranks of a node, a copy on each node."""
    recompute: bool = False
    """Drop the blocks' activations and compute them again in the backward pass: memory for time."""
    compile: bool = False
    """Compile each block (torch.compile); pays on GPUs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of forward and backward; weights, optimizer and EMA stay float32."""


class UpsamplerConfig(Config):
    """Second stage of the cascade: the small video, noised a little, is part of the input."""

    small_size_px: tuple[int, int] = (36, 64)
    """(height, width) of the small video: the base model's; 36 x 64 (Snap Video)."""
    start_from: Location | None = None
    """Run of a base model, or one of its checkpoints, whose weights the upsampler starts with (as Snap
    Video); None = freshly drawn."""


class StageConfig(InputConfig):
    """What both stages share."""

    stage: ClassVar[str] = "stage1"
    prompts: Incidental[Location]
    """Folder or URI of certified prompt shards."""
    out: Incidental[Location]
    """Folder or URI of the run."""
    samples: int = Field(default=550_000 * 4096, ge=1)
    """Training length in samples; Snap Video's base model: 550,000 steps of 4,096."""
    batch_size: int = Field(default=4096, ge=1, le=10_000_000)
    """Samples of an optimizer step over all workers; Snap Video: 2,048 videos + 2,048 images."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches of a step, one after the other; the result stays the same but for rounding."""
    preset: str = "fit-500m"
    """Backbone by name (`model.backbones.presets`), or package.module:CONFIG of your own. Which FIT VIMI used
    is not stated."""
    backbone: BackboneFields = Field(default_factory=dict)
    """Fields of the preset's config to change, e.g. {"num_blocks": 4}; or in its place a pretrained model of
    diffusers, {kind: diffusers, model: <folder or hub id>}, whose autoencoder and objective follow."""
    encodings: Incidental[Location | None] = None
    """Folder that `vimi-data encode` made of these prompts for this config: read in place of running the frozen
    encoders, to the same losses. None = encode every sample when it is drawn."""
    augment_references: bool = False
    """Change the pictures of subjects each time they are loaded, by Video Alchemist's list (crop, size, blur,
    colour, brightness, flip, shear, turn): against copying, where references are cut out of their own targets.
    Needs the encoder while training, so not with `encodings`."""
    upsampler: UpsamplerConfig | None = None
    """Train the second stage of the cascade instead of a base model; None = a base model."""
    self_condition_rate: float = Field(default=0.9, ge=0, le=1)
    """Share of samples that get latents of a first pass; 0.9 (Snap Video, table 8)."""
    noise: dict[str, float] = Field(default_factory=dict)
    """Fields of the diffusion process to change (model/edm.py). sigma_data: assumed deviation of the data, 1
    (Snap Video, whose ablation prefers it to 0.5). log_mean, log_std: of ln sigma, -1.2 and 1.2 (EDM
    table 1). Pixels of real clips deviate by about 0.5, and a run of minutes learns sooner with that and with
    more noise: {sigma_data: 0.5, log_mean: 0.4, log_std: 1.4} (`bench_quality`). With flow matching
    (model/flow.py): shift of the times, by default that of the pretrained scheduler; mean, std of logit t."""
    optim: OptimConfig = OptimConfig()
    ema: tuple[str, ...] = (f"half-life-{6_000 * 4096}", "power-0.05", "power-0.1")
    """Averages of the weights kept beside them, by the names that `sample --ema` takes: half-life-<samples>
    (Snap Video: 6,000 steps of 4,096; capped at a tenth of the run, so that a short run's average is not its
    start), power-<sigma_rel> (EDM2, 2312.02696: from 0.05 and 0.10 others are reconstructed)."""
    validation: ValidationConfig = ValidationConfig()
    preview_every_samples: Incidental[int | None] = Field(default=None, ge=0)
    """Samples between two times that a few videos are sampled while training; None = only at the end, 0 =
    never."""
    checkpoint: Incidental[CheckpointConfig] = CheckpointConfig()
    loader_threads: Incidental[int] = Field(default=2, ge=1, le=256)
    """Threads a rank that read and decode; PyAV and pyarrow release the GIL."""
    parallel: Incidental[ParallelConfig] = ParallelConfig()
    log_every_samples: Incidental[int] = Field(default=80, ge=1)
    """Samples between two records of metrics.jsonl, each of which is a progress line."""
    trackers: Incidental[tuple[str, ...]] = ("tensorboard",)
    """Where the records also go: tensorboard (in local run folders), wandb or wandb:<project> (pip install
    'vimi[wandb]')."""
    ray: Incidental[RayConfig] = RayConfig()
    num_workers: Incidental[int | tuple[int, int] | None] = None
    """Training processes, from 1; None = one per GPU that is there at the start, 1 without GPUs. A range
    (`[1, 8]`, on the command line `1-8`) takes what the cluster has and changes with it (Ray Train's
    elasticity); ranks may then differ by one sample a micro-batch. Any number continues the same run with the
    same samples."""
    seed: int = 0
    """Of the weights at the start, and of all draws; each draw is a function of (seed, sample)."""

    @model_validator(mode="before")
    @classmethod
    def _what_follows_from_a_pretrained_backbone(cls, values: Any) -> Any:
        return with_base(values)

    @field_validator("noise")
    @classmethod
    def _fields_of_the_process(cls, value: dict[str, float]) -> dict[str, float]:
        for name, number in value.items():
            one_of(name, NOISE)
            if not (-100 if name.endswith("mean") else 0) < number <= 100:
                raise ValueError(f"{name} {number}; legal: above 0 (means: above -100), at most 100")
        return value

    @field_validator("ema")
    @classmethod
    def _averages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            make_profile(name)
        return value

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            one_of(name.partition(":")[0], TRACKERS)
        return value

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
    def _no_cascade_of_a_pretrained_one(self) -> "StageConfig":
        if self.pretrained is not None and self.upsampler is not None:
            raise ValueError("an upsampler with backbone.kind diffusers; legal: an upsampler of a preset")
        return self

    @model_validator(mode="after")
    def _upsampler_enlarges(self) -> "StageConfig":
        if self.upsampler is None:
            return self
        if self.autoencoder is not None:
            raise ValueError("an upsampler works in pixels; legal: no autoencoder with it")
        if any(b.height_px or b.width_px for b in self.buckets):
            raise ValueError("an upsampler has one size; legal: buckets without height_px and width_px with it")
        height, width = self.upsampler.small_size_px
        if not (1 <= height < self.height_px and 1 <= width < self.width_px):
            raise ValueError(
                f"an upsampler from {height} x {width} to {self.height_px} x {self.width_px} pixels; "
                "legal: height_px and width_px above the small video's"
            )
        return self

    @property
    def pretrained(self) -> DiffusersConfig | None:
        """The pretrained backbone; None for a preset."""
        return self.backbone if isinstance(self.backbone, DiffusersConfig) else None

    @property
    def micro_batch(self) -> int:
        """Samples of a micro-batch over all workers."""
        return self.batch_size // self.accumulation

    @property
    def num_steps(self) -> int:
        """Optimizer steps: the samples, rounded up to whole steps."""
        return -(-self.samples // self.batch_size)

    @property
    def total_samples(self) -> int:
        """Samples of all steps."""
        return self.num_steps * self.batch_size

    @property
    def task_weights(self) -> dict[str, float] | None:
        """Share of samples of each task; None = as the shards hold them."""
        return None

    @property
    def small_size_px(self) -> tuple[int, int] | None:
        """(height, width) of an upsampler's small video; None for a base model."""
        return self.upsampler.small_size_px if self.upsampler else None

    @property
    def sigma_data(self) -> float:
        return self.noise.get("sigma_data", Edm.sigma_data)

    @property
    def ema_profiles(self) -> dict[str, Profile]:
        return {name: make_profile(name, longest=max(1, self.total_samples // 10)) for name in self.ema}

    def is_due(self, every_samples: int | None, position: int) -> bool:
        """Whether the step that led to `position` crossed a multiple of the interval, or is the last.

        A function of the position alone, so that all ranks agree and a resumed run keeps it.
        """
        if position >= self.total_samples:
            return True
        return bool(every_samples) and position // every_samples > (position - self.batch_size) // every_samples


class Stage1Config(StageConfig):
    """Pretraining on retrieval-augmented prompts."""


class Stage2Config(StageConfig):
    """Instruction tuning: finetunes a stage-1 run on a mixture of tasks."""

    stage: ClassVar[str] = "stage2"
    start_from: Incidental[Location]
    """Run folder of stage 1, or one of its checkpoints."""
    stage1_prompts: Incidental[Location | None] = None
    """Stage 1's prompts: their text-to-video loss is watched with each validation, so that what stage 2 forgets
    is seen. null = where stage 1 read them; where they are no more, that is said, and nothing is watched."""
    start_ema: str | None = None
    """EMA of it to start from (its name in the checkpoint, e.g. power-0.05); None = the weights."""
    tasks: dict[str, float] | None = Field(default_factory=lambda: {task.value: 1.0 for task in TASKS})
    """Share of samples of each task. VIMI names these three and prints no proportions, so equal shares are
    ours; null takes the shards' own."""
    samples: int = Field(default=200_000 * 3072, ge=1)
    """UNIMO-G's second stage (2401.13388), the nearest recipe in print: 200,000 steps of 3,072."""
    batch_size: int = Field(default=3072, ge=1, le=10_000_000)
    """UNIMO-G's second stage."""
    optim: OptimConfig = OptimConfig(lr=1e-3)
    """A fifth of stage 1's learning rate: the ratio of UNIMO-G's stages (5e-5 to 1e-5)."""

    @property
    def task_weights(self) -> dict[str, float] | None:
        return self.tasks


def config_class(stage: str) -> type[Stage1Config] | type[Stage2Config]:
    return Stage2Config if stage == "stage2" else Stage1Config


def imports_in(values: Mapping[str, Any]) -> list[str]:
    """Import paths in a stage's config: a backbone or an optimizer from outside of this project."""
    optim = values.get("optim")
    names = (values.get("preset"), optim.get("name") if isinstance(optim, Mapping) else None)
    return [name for name in names if isinstance(name, str) and ":" in name]


def config_of(facts: Mapping[str, Any], uri: str, *, own: StageConfig | None = None) -> StageConfig:
    """The config that a checkpoint was trained by.

    What `own`, the user's config, imports, the checkpoint's may import too.

    Raises:
        ConfigError: it would import other code than this project's.
    """
    trusted = imports_in(own.model_dump()) if own is not None else []
    refuse_imports(imports_in(facts["config"]), of=uri, own=trusted)
    return config_class(facts["stage"]).model_validate(facts["config"])
