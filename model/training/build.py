"""Builds network, conditioning, targets and data plan of a run from its config."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from infra.errors import ConfigError
from infra.pretrained import or_refused
from infra.recent import Recent
from model.backbones.base import BackboneConfig
from model.backbones.folder import read_base
from model.backbones.presets import preset
from model.condition import (
    MAX_REFERENCES,
    Beforehand,
    Condition,
    ConditionConfig,
    Prompt,
    References,
    Segment,
)
from model.data.augment import augment_references
from model.data.batch import ROLES, Batch
from model.data.inputs import InputConfig
from model.data.plan import Plan
from model.edm import Edm, edm_for
from model.encodings.store import Encodings, StoredRow
from model.generator import Generator, SmallVideo, build_generator
from model.latents import Latents, open_latents, outline_latents
from model.objective import Objective
from model.prompt.encoder import PromptEncoder
from model.prompt.pictures import ReferenceSize, first_frame, reference_pixels, reference_tensors
from model.prompt.select import select
from model.space import PIXELS, Space
from model.step import Draws, draw, draw_dropped, draw_num_documents, sample_generator
from model.training.config import NOISE, StageConfig
from model.training.parallel import warning_only
from model.training.pretrained import pretrained_of

MAX_SMALL_LEVEL = 1.0
"""Noise on an upsampler's small video in training: its standard deviation is uniform in [0, this]. Snap Video
says "random level" and no more; 1, as much noise as signal, is ours."""
PICTURE_BYTES = 64 << 20
"""Decoded pictures that a rank keeps, those of a small corpus. Ours."""


def backbone_of(config: StageConfig, space: Space) -> BackboneConfig:
    """Sizes of the network: the preset's, at the shape that a clip has in `space`.

    Raises:
        ConfigError: a preset for the upsampler without one, or pixels that the autoencoder can't divide.
        ValueError, TypeError: an unknown preset or field.
    """
    if config.pretrained is not None:
        return pretrained_of(config, config.pretrained, space)
    frames, channels, height, width = space.shape(config.num_frames, config.height_px, config.width_px)
    named = preset(config.preset)
    if named.is_upsampler and config.upsampler is None:
        raise ConfigError(
            f"preset {config.preset!r} is an upsampler",
            legal="upsampler: {small_size_px, ...} in the config with it",
        )
    return replace(
        named,
        num_frames=frames,
        height_px=height,
        width_px=width,
        in_channels=channels * (2 if config.upsampler else 1),
        out_channels=channels,
        checkpoint=config.parallel.recompute,
        **dict(config.backbone),
    )


def make_generator(config: StageConfig, token_dim: int, space: Space = PIXELS) -> Generator:
    """The network of this config, freshly drawn from its seed: the same on every rank."""
    torch.manual_seed(config.seed)
    backbone = backbone_of(config, space)
    condition = condition_config(config, token_dim, space)
    if config.pretrained is None:
        return build_generator(backbone, condition)
    with or_refused(f"can't load the transformer of {config.pretrained.model}"):
        return build_generator(backbone, condition)


def condition_config(config: InputConfig, token_dim: int, space: Space) -> ConditionConfig:
    """Sizes of the condition embedder: references have the generator's channels."""
    return ConditionConfig(
        token_dim=token_dim,
        mode=config.references,
        num_roles=len(ROLES),
        reference_channels=space.channels,
        reference_patch=max(1, config.reference_patch_px // space.factor_px),
    )


def reference_shape(config: InputConfig, space: Space) -> tuple[int, int, int]:
    """(c, h, w) of a reference as the generator sees it.

    Raises:
        ConfigError: it doesn't divide into patches of whole latents.
    """
    _, channels, height, width = space.shape(1, *config.reference_size_px)
    side = max(1, config.reference_patch_px // space.factor_px)
    if height % side or width % side:
        legal = side * space.factor_px
        raise ConfigError(
            f"reference_size_px {list(config.reference_size_px)} in patches of {side} x {side} latents",
            legal=f"multiples of {legal}",
        )
    return channels, height, width


def make_plan(config: StageConfig, index: pa.Table, num_groups: int) -> Plan:
    """The order of samples of this run."""
    return Plan(
        index,
        num_groups,
        seed=config.seed,
        micro_batch=config.micro_batch,
        bucket_weights={n: b.weight for n, b in enumerate(config.buckets)},
        task_weights=config.task_weights,
    )


class Conditioner:
    """Prompts of a batch -> the generator's condition, by the frozen encoder."""

    def __init__(
        self,
        config: StageConfig,
        encoder: PromptEncoder,
        device: torch.device,
        space: Space,
        autoencoder: Callable[[], Latents | None],
    ) -> None:
        """`space` is the generator's, and `autoencoder` leads there; it is asked for when it is needed."""
        self.config, self.encoder, self.device = config, encoder, device
        self.space, self.autoencoder = space, autoencoder
        self.gives_first_frames = config.references == "plus" and space.has_first_frame
        self.pictures: Recent[tuple[bytes, bool], Tensor] = Recent(PICTURE_BYTES)

    def __call__(
        self,
        prompts: list[Prompt],
        fps: Tensor,
        original_size_px: Tensor,
        encoded: Beforehand = (),
        references: References | None = None,
    ) -> Condition:
        """`encoded`, `references`: what was made beforehand; (), None = nothing."""
        references = references or self.references(*prompts)
        with torch.no_grad(), warning_only():
            condition = self.encoder.condition(
                prompts,
                fps=fps,
                original_size_px=original_size_px,
                references=references,
                encoded=encoded,
            )
        condition = replace(condition, has_first_frame=self.has_first_frame(prompts)).to(self.device)
        if condition.references is None or condition.reference_mask is None:
            return condition
        return replace(condition, references=self._seen(condition.references, condition.reference_mask))

    @torch.no_grad()
    def _seen(self, pictures: Tensor, present: Tensor) -> Tensor:
        """`b n c h w`: uint8 pixels in [-1, 1], or in latent space through the autoencoder, one by one: so that
        the latents of a picture are the same whatever it stands beside. Latents stay as they are.
        """
        if pictures.dtype != torch.uint8:
            return pictures
        pixels = pictures.float() / 127.5 - 1.0
        if not self.space.is_latent:
            return pixels
        seen = pixels.new_zeros(*present.shape, *reference_shape(self.config, self.space))
        for row, number in present.nonzero().tolist():
            latents = self.autoencoder()
            if latents is None:
                raise ValueError("references in latent space without an autoencoder")
            seen[row, number] = latents.encode(pixels[row, number][None, None])[0, 0]
        return seen

    def has_first_frame(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """`b` bool: whose first frame stands in its video as it is; None = nobody's."""
        if not self.gives_first_frames:
            return None
        given = torch.tensor([first_frame(prompt) is not None for prompt in prompts])
        return given if given.any() else None

    def references(self, *prompts: Prompt, stored: StoredRow | None = None) -> References | None:
        """The pictures of prompts that the generator sees itself; None where it sees none (`faithful`).

        `stored` holds their latents, where the generator works in such and they were encoded beforehand.

        Raises:
            PictureError: one can't be decoded.
            DataError: one is not among what is stored.
        """
        if self.config.references == "faithful":
            return None
        if stored is not None and self.space.is_latent:
            return reference_tensors(prompts, self.config.reference_size, stored.reference)
        return reference_tensors(prompts, self.config.reference_size, self._pixels)

    def _pixels(self, segment: Segment, size: ReferenceSize) -> Tensor:
        """`reference_pixels`, which a small corpus asks for again in each epoch."""
        key = (segment.image or b"", ROLES[segment.role].is_scene)
        pixels = self.pictures.find(key)
        if pixels is None:
            pixels = reference_pixels(segment, size)
            if not self.config.augment_references:  # else no picture comes twice
                self.pictures.keep(key, pixels, len(key[0]) + pixels.nbytes)
        return pixels

    def choose(self, prompt: Prompt, position: int) -> Prompt:
        """K documents and condition dropout, drawn for the sample at this position."""
        seed = self.config.seed
        number = draw_num_documents(self.config.documents, seed=seed, index=position)
        chosen = select(prompt, number, draw_dropped(self.config.dropout, seed=seed, index=position))
        if not self.config.augment_references:
            return chosen
        return augment_references(chosen, seed=seed, index=position)


class Targets:
    """What the generator learns to make, out of a batch: pixels or latents, and an upsampler's small video.

    targets(batch)     x, `b t c h w`        targets.objective(x)      its diffusion process
    targets.draw(...)  all that is random about the batch

    Attributes:
        space: pixels, or latents of the frozen autoencoder.
        small_size: (height, width) in pixels of an upsampler's small video; None for a base model.
    """

    def __init__(self, config: StageConfig, device: torch.device, encodings: Encodings | None = None) -> None:
        """`encodings`: their latents, if they hold any, spare loading the autoencoder."""
        self.config, self.device, self.small_size = config, device, config.small_size_px
        self.space = space_of(encodings) or (self.latents.space if self.latents else PIXELS)

    def __call__(self, batch: Batch) -> Tensor:
        """`b t c h w` of a batch, on the device. Clips go through the autoencoder one by one: so the latents
        of a clip are the same to the last bit whatever it is batched with, which exact resume needs.
        """
        if batch.latents is not None:
            return batch.latents.to(self.device, non_blocking=True)
        pixels = batch.target(self.device)
        if self.latents is None:
            return pixels
        return torch.cat([self.latents.encode(clip[None]) for clip in pixels])

    @cached_property
    def latents(self) -> Latents | None:
        """The autoencoder, loaded when it is needed; None for pixels."""
        return open_latents(self.config.autoencoder, self.device)

    def objective(self, x: Tensor) -> Objective:
        """The process of targets of this shape, with the run's distribution of noise levels."""
        return objective_of(self.config, x.shape)

    def draw(self, x: Tensor, positions: Sequence[int]) -> Draws:
        """All that is random about a training batch."""
        return draw(
            self.objective(x),
            x.shape[1:],
            seed=self.config.seed,
            indices=positions,
            self_condition_rate=self.config.self_condition_rate,
            max_small_level=None if self.small_size is None else MAX_SMALL_LEVEL,
            device=self.device,
        )

    def fixed_small(self, x: Tensor, key: int) -> SmallVideo | None:
        """For validation, the small video's noise by the sample's key, at half the largest level."""
        if self.small_size is None:
            return None
        generator = sample_generator(0, key, "small_noise", self.device)
        noise = torch.randn(x.shape[1:], generator=generator, device=self.device)
        level = torch.full((len(x),), MAX_SMALL_LEVEL / 2, device=self.device)
        return SmallVideo(noise.expand(x.shape), level)


def edm_of(noise: dict[str, float], shape: Sequence[int]) -> Edm:
    """The process of tensors `... t c h w`: sigma_in follows from their own shape, `noise` is a config's."""
    t, _, h, w = shape[-4:]
    try:
        return replace(edm_for(t, h, w), **noise)
    except TypeError:
        raise ConfigError(f"noise {', '.join(noise)} with a preset", legal=", ".join(NOISE[:3])) from None


def objective_of(config: StageConfig, shape: Sequence[int]) -> Objective:
    """What the backbone of a config was made for, for tensors `... t c h w`: EDM, or its family's own.

    Raises:
        ConfigError: `noise` names fields of another process.
    """
    if config.pretrained is None:
        return edm_of(config.noise, shape)
    base = read_base(config.pretrained.model)
    t, rows, columns = base.family.sizes(base.transformer).patch
    num_tokens = (shape[-4] // t) * (shape[-2] // rows) * (shape[-1] // columns)
    objective: Any = base.family.objective(base.scheduler, num_tokens)
    legal = [field.name for field in fields(objective) if field.name in NOISE]
    if unknown := set(config.noise) - set(legal):
        raise ConfigError(
            f"noise {', '.join(sorted(unknown))} with {base.family.transformer}", legal=", ".join(legal)
        )
    return replace(objective, **config.noise)


def space_of(encodings: Encodings | None) -> Space | None:
    """The space of latents that were encoded beforehand; None where there are none."""
    if encodings is None or encodings.facts.autoencoder_content is None:
        return None
    return Space(**encodings.facts.space)


def space_in(facts: dict[str, object]) -> Space:
    """The space that a checkpoint was trained in."""
    values = facts.get("space")
    return Space(**values) if isinstance(values, dict) else PIXELS


def describe_space(space: Space) -> str:
    return f"latents of autoencoder {space.identity[:12]}" if space.is_latent else "pixels"


def measure_space(config: InputConfig, encodings: Encodings | None = None, *, reach: bool = True) -> Space:
    """The space of a config, for the preflight: the autoencoder is loaded on the CPU and measured.

    `reach` False: by its config alone, so that no weights are fetched; the space's identity is then its name.

    Raises:
        ConfigError: no such autoencoder, or sides of the clips that it can't divide.
    """
    space = space_of(encodings)
    if space is None and config.autoencoder is not None and not reach:
        space, _ = outline_latents(config.autoencoder)
    elif space is None:
        latents = open_latents(config.autoencoder)
        space = latents.space if latents else PIXELS
    for bucket in config.shapes:
        space.shape(bucket.num_frames, bucket.height_px, bucket.width_px)
    if config.references == "plus":
        reference_shape(config, space)
    return space


def most_references(config: StageConfig) -> int:
    """Pictures that the generator sees itself beside one video, at most: in stage 1 those of documents."""
    if config.references == "faithful":
        return 0
    return MAX_REFERENCES if config.stage == "stage2" else min(MAX_REFERENCES, max(config.documents))


def heaviest_batch(
    config: StageConfig, count: int, *, encoder: PromptEncoder, space: Space, has_latents: bool
) -> tuple[Batch, Condition]:
    """The heaviest micro-batch that a run can meet, blank: largest bucket, longest prompts, most references.

    `count` is one rank's; `has_latents`: they are read, so the autoencoder need not be tried.
    """
    bucket = max(config.shapes, key=lambda b: b.num_frames * b.height_px * b.width_px)
    sizes = (bucket.num_frames, bucket.height_px, bucket.width_px)
    length = config.encoder.max_tokens
    plain = torch.zeros(count, length, dtype=torch.long)
    fps, size = torch.full((count,), 24.0), torch.full((count, 2), 288.0)
    names = [""] * count
    pixels = torch.zeros(count, sizes[0], 3, *sizes[1:]).byte()
    batch = Batch([0] * count, names, names, [()] * count, pixels, fps, size)
    if has_latents:
        batch = replace(batch, latents=torch.zeros(count, *space.shape(*sizes)))
    pictures, shown, most = None, None, most_references(config)
    if config.references == "plus":
        pictures = torch.zeros(count, most, *reference_shape(config, space))
        shown = torch.ones(count, most, dtype=torch.bool)
    return batch, Condition(
        tokens=torch.zeros(count, length, encoder.dim, dtype=encoder.dtype),
        mask=torch.ones(count, length, dtype=torch.bool),
        role=plain,
        segment=plain,
        fps=fps,
        original_size_px=size,
        references=pictures,
        reference_mask=shown,
        reference_role=None if shown is None else shown.long(),
        reference_place=None if shown is None else shown.long(),
    )
