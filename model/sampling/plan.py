"""What to sample: the config of `vimi-train sample`, what it refuses, and the videos that it asks for.

Nothing is loaded here but prompts and a checkpoint's facts.
"""

from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field, model_validator

from infra.config import Config, Incidental, Location, NameOrFolder
from infra.errors import ConfigError
from infra.validation_cells import Documents
from model.backbones.folder import base_sha256
from model.condition import Prompt
from model.prompt.select import retrieved
from model.sampling.base import check_base, untrained, with_defaults
from model.sampling.documents import (
    Found,
    choose_documents,
    cut_documents,
    with_found,
)
from model.sampling.maker import GuidanceConfig
from model.sampling.requests import (
    SampleRequest,
    caption_of,
    parse_prompt,
    prompts_in_file,
    requests_in_shards,
)
from model.training.checkpoint import checkpoint_hash, find_checkpoint, read_facts
from model.training.config import WEIGHTS, StageConfig
from model.training.state import check_average, trained_by

NOTHING: Found = MappingProxyType({})
Side = Annotated[int, Field(ge=1, le=65536)]
"""Of a picture, pixels."""


class UpsampleConfig(Config):
    """The cascade's second stage."""

    run: Location
    """Folder of an upsampler's run, or one of its checkpoints."""
    ema: str = WEIGHTS
    """As in the base model's config."""
    num_steps: int = Field(default=40, ge=1, le=100_000)
    """Sampling steps; 40 (Snap Video)."""
    level: float = Field(default=0.1, ge=0, le=1000)
    """Noise put on the small video, which hides what the base model got wrong. Snap Video searches it and
    prints no value; 0.1 is ours."""
    guidance: GuidanceConfig = GuidanceConfig()


class SampleConfig(Config):
    """What to sample. Prompts come from `prompts`, `prompts_file` and `prompts_uri`, one after another."""

    run: Location | None = None
    """Folder of a stage1 or stage2 run, or one of its checkpoints."""
    base: NameOrFolder | None = None
    """In place of a run a pretrained model as it is: folder or hub id of a pipeline of diffusers. Where nothing
    else is said, num_frames, size_px, num_steps, guidance.weight and fps are those of its stock pipeline."""
    out: Incidental[Location]
    """Folder or URI of the videos."""
    prompts: tuple[str, ...] = ()
    """Prompts in words; `<image>` marks the place of a picture."""
    images: tuple[str, ...] = ()
    """Pictures for the placeholders of all `prompts`, in order: `path`, or `role:path` with role subject,
    background, first_frame or retrieved; a document brings its text as `retrieved:text=path`."""
    prompts_file: Location | None = None
    """JSONL file of prompts (model/sampling/requests.py)."""
    prompts_uri: Location | None = None
    """Folder of prompt shards: their documents and pictures come with them."""
    rows: int = Field(default=4, ge=1, le=1_000_000)
    """How many prompts of `prompts_uri`."""
    split: str | None = None
    """Only rows of this split of `prompts_uri` (train, val, test, as the corpus names them); null = all."""
    num_documents: int | None = Field(default=None, ge=0)
    """Retrieved documents that stay in each prompt, best first; null = what was given by hand, and of a
    shard's row as many as the run has learned with at most."""
    documents: Documents = "right"
    """Whose documents each prompt gets: its own (right), none, or those of another prompt (shuffled, another
    shuffle for each seed): the controls, with the same noise."""
    ema: str = WEIGHTS
    """`weights`, a stored average by name (power-0.05, half-life-...), or `power-<sigma_rel>` of any width,
    reconstructed from the stored ones (EDM2)."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0,)
    """One video for each prompt and seed. Prompts in words share a seed's noise; each row of shards has its
    own, whatever its documents."""
    num_steps: int = Field(default=256, ge=1, le=100_000)
    """Sampling steps; 256 (Snap Video's base model; good from 64)."""
    guidance: GuidanceConfig = GuidanceConfig()
    fps: float | None = Field(default=None, gt=0, le=1000)
    """Frame rate to condition on and to write, for prompts that don't bring their own; null = as the videos of
    its training usually have (of a checkpoint that doesn't say, 24: VIMI)."""
    original_size_px: tuple[Side, Side] | None = None
    """(height, width) of the original to condition on, likewise (288 x 512: VIMI's output size)."""
    batch_size: int = Field(default=1, ge=1, le=65536)
    """Videos made at once: faster for small models, as far as memory goes. At 1 a video is the same to the bit
    whatever else is asked for; above, its company in the batch may change its last bits."""
    num_frames: int | None = Field(default=None, ge=1)
    """Frames; null = as trained."""
    size_px: tuple[int, int] | None = None
    """(height, width) of the base model's video: of a bucket that it was trained on; null = its main size."""
    upsampler: UpsampleConfig | None = None
    """Second stage of the cascade, which enlarges each video; null = the base model's size."""

    @model_validator(mode="before")
    @classmethod
    def _what_follows_from_a_base_model(cls, values: Any) -> Any:
        return with_defaults(values)

    @model_validator(mode="after")
    def _a_run_or_a_base_model(self) -> "SampleConfig":
        if (self.run is None) == (self.base is None):
            got = "neither a run nor" if self.run is None else "a run and"
            raise ValueError(f"{got} a base model; legal: a run's folder, or --base with a pretrained model")
        return self

    @property
    def source(self) -> str:
        """What is sampled, as it was named."""
        return self.run or self.base or ""


def made_by(config: SampleConfig) -> tuple[str, StageConfig]:
    """The weights that are sampled, a checkpoint or a base model, and the config of their training."""
    if config.base is None:
        return trained_by(config.source)
    size, frames = config.size_px or (0, 0), config.num_frames or 1
    return config.base, untrained(config.base, num_frames=frames, size_px=size)


def weights_hash(config: SampleConfig, uri: str) -> str:
    """16 hex digits of the weights that `made_by` found."""
    return checkpoint_hash(uri) if config.base is None else base_sha256(uri)[:16]


def check(config: SampleConfig, found: Found = NOTHING) -> str:
    """Refuse what can't work before anything is loaded; the plan in words."""
    uri, base = made_by(config)
    if config.base is not None:
        check_base(base, read_prompts(config, base), ema=config.ema)
    else:
        check_average(uri, config.ema)
    if base.upsampler is not None:
        raise ConfigError(f"{uri} is an upsampler", cure="give a base model's run, and this one as --upsampler")
    count = len(plan_videos(config, base, found))
    frames = config.num_frames or base.num_frames
    if frames > base.num_frames:
        raise ConfigError(f"num_frames {config.num_frames}", legal=f"at most {base.num_frames}, as trained")
    legal = {(base.height_px, base.width_px), *((b.height_px, b.width_px) for b in base.shapes)}
    size = config.size_px or (base.height_px, base.width_px)
    if size not in legal:
        raise ConfigError(f"size_px {list(size)}", legal=" or ".join(str(list(s)) for s in sorted(legal)))
    if config.upsampler is not None:
        check_cascade(config.upsampler, frames, size)
    return f"{count} videos of {frames} frames from {uri} ({config.ema})"


def check_cascade(upsampler: UpsampleConfig, frames: int, size_px: tuple[int, int]) -> None:
    """Refuse a cascade whose sizes don't meet: the base model makes `frames` of `size_px` (height, width).

    Raises:
        ConfigError: says which.
    """
    place, large = trained_by(upsampler.run)
    check_average(place, upsampler.ema)
    taken = large.small_size_px
    if taken is None:
        raise ConfigError(
            f"{place} is no upsampler", cure="train one: `upsampler: {...}` in the stage's config"
        )
    if size_px != taken or frames > large.num_frames:
        raise ConfigError(
            f"the base model makes {frames} frames of {size_px[0]} x {size_px[1]} pixels",
            legal=f"what this upsampler takes: up to {large.num_frames} frames of {taken[0]} x {taken[1]}",
        )


def read_prompts(config: SampleConfig, base: StageConfig) -> list[Prompt]:
    """The prompts in words, of the command line and of the file, as they were given.

    Raises:
        ConfigError: one that can't be read.
    """
    instruct, images = base.stage == "stage2", list(config.images)
    prompts = []
    for text in config.prompts:
        mine = [images.pop(0) for _ in range(min(text.count("<image>"), len(images)))]
        prompts.append(parse_prompt(text, mine, instruct=instruct))
    if images:
        raise ConfigError(f"{len(images)} images too many", legal="one for each <image> of the prompts")
    if config.prompts_file:
        prompts += prompts_in_file(config.prompts_file, instruct=instruct)
    return prompts


def texts_to_retrieve(config: SampleConfig, base: StageConfig) -> list[str]:
    """Captions of the prompts in words that bring no documents of their own, each once."""
    prompts = [prompt for prompt in read_prompts(config, base) if not retrieved(prompt)]
    return list(dict.fromkeys(caption_of(prompt) for prompt in prompts))


def given_to_words(config: SampleConfig) -> tuple[float, tuple[int, int]]:
    """Frame rate and original size (height, width) that prompts without their own are conditioned on."""
    usual = None if config.base else read_facts(find_checkpoint(config.source)).get("usual")
    usual = usual or {"fps": 24.0, "original_size_px": (288, 512)}
    height, width = config.original_size_px or usual["original_size_px"]
    return config.fps or usual["fps"], (height, width)


def read_requests(config: SampleConfig, base: StageConfig, found: Found) -> list[SampleRequest]:
    """All prompts that the config asks for, of a model that `base` trained, each once.

    Raises:
        ConfigError: none, or one that can't be read.
    """
    (fps, size), number = given_to_words(config), config.num_documents
    learned = max(base.documents) if number is None else number
    requests = []
    for prompt in read_prompts(config, base):
        request = SampleRequest(prompt, fps, size)
        row = None if retrieved(prompt) else found.get(caption_of(prompt))
        if row is not None:
            request = cut_documents(with_found(request, row, instruct=base.stage == "stage2"), learned)
        requests.append(request if number is None else cut_documents(request, number))
    if config.prompts_uri:
        rows = requests_in_shards(
            config.prompts_uri, config.rows, fps=fps, original_size_px=size, split=config.split
        )
        requests += [cut_documents(row, learned) for row in rows]
    if not requests:
        raise ConfigError("no prompts", cure='give a prompt ("A dog runs."), prompts_file or prompts_uri')
    return requests


def plan_videos(config: SampleConfig, base: StageConfig, found: Found = NOTHING) -> list[SampleRequest]:
    """One request for each prompt and seed, with the documents that the config chooses.

    `found` is what was retrieved for the captions of prompts in words.

    Raises:
        ConfigError: no prompts, or nothing to shuffle.
    """
    requests = read_requests(config, base, found)
    if config.documents == "shuffled":
        having = sum(bool(retrieved(request.prompt)) for request in requests)
        if having < 2:
            raise ConfigError(
                f"documents shuffled: {having} of {len(requests)} prompts have documents",
                legal="at least two, of a run that learned with documents",
                cure="give more prompts, of shards with --set rows=N, or in words with --memory",
            )
    turns = [
        [replace(request, seed=seed) for request in choose_documents(requests, config.documents, seed)]
        for seed in config.seeds
    ]
    return [request for prompt in zip(*turns, strict=True) for request in prompt]
