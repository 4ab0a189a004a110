"""What a run is made of, from its config: the network, the prompts' way into it, the order of samples."""

from dataclasses import replace

import pyarrow as pa
import torch
from torch import Tensor

from infra.errors import ConfigError
from model.condition import Beforehand, Condition, ConditionConfig, Prompt
from model.data.batch import ROLES
from model.data.plan import Plan
from model.generator import BackboneConfig, Generator, preset
from model.prompt.encoder import PromptEncoder
from model.prompt.pictures import reference_tensors
from model.prompt.select import select
from model.space import PIXELS, Space
from model.step import draw_dropped, draw_num_documents
from model.training.parallel import warning_only
from model.training.stages import StageConfig


def backbone_of(config: StageConfig, space: Space) -> BackboneConfig:
    """Sizes of the network: the preset's, at the shape that a clip has in `space`.

    Raises:
        ConfigError: a preset for the upsampler without one, or pixels that the autoencoder can't divide.
        ValueError, TypeError: an unknown preset or field.
    """
    frames, channels, height, width = space.shape(config.num_frames, config.height_px, config.width_px)
    named = preset(config.preset)
    if named.in_channels > named.out_channels and config.upsampler is None:
        raise ConfigError(
            f"preset {config.preset!r} is an upsampler",
            legal="upsampler: {small_height_px, small_width_px, ...} in the config with it",
        )
    return replace(
        named,
        num_frames=frames,
        height_px=height,
        width_px=width,
        in_channels=channels * (2 if config.upsampler else 1),
        out_channels=channels,
        checkpoint=config.parallel.recompute,
        **config.backbone,
    )


def make_generator(config: StageConfig, token_dim: int, space: Space = PIXELS) -> Generator:
    """The network of this config, freshly drawn from its seed: the same on every rank."""
    torch.manual_seed(config.seed)
    backbone = backbone_of(config, space)
    condition = ConditionConfig(token_dim=token_dim, mode=config.references, num_roles=len(ROLES))
    return Generator(backbone, condition)


class Conditioner:
    """Prompts of a batch -> the generator's condition, by the frozen encoder."""

    def __init__(self, config: StageConfig, encoder: PromptEncoder, device: torch.device) -> None:
        self.config, self.encoder, self.device = config, encoder, device

    def __call__(
        self,
        prompts: list[Prompt],
        fps: Tensor,
        original_size_px: Tensor,
        encoded: Beforehand = (),
    ) -> Condition:
        """`encoded`: what was encoded beforehand; () = nothing."""
        references = None
        if self.config.references == "plus":
            references = reference_tensors(prompts, size_px=self.reference_size_px)
        with torch.no_grad(), warning_only():
            condition = self.encoder.condition(
                prompts,
                fps=fps,
                original_size_px=original_size_px,
                references=references,
                encoded=encoded,
            )
        return condition.to(self.device)

    @property
    def reference_size_px(self) -> tuple[int, int]:
        """(height, width) of reference pictures in `plus` mode: whole patches of 8."""
        return self.config.height_px // 8 * 8, self.config.width_px // 8 * 8

    def most_references(self, count: int) -> Tensor | None:
        """As many blank reference pictures as `count` prompts can have; None in `faithful` mode."""
        if self.config.references != "plus":
            return None
        return torch.zeros(count, ConditionConfig().max_references, 3, *self.reference_size_px)

    def choose(self, prompt: Prompt, position: int) -> Prompt:
        """K documents and condition dropout, drawn for the sample at this position."""
        seed = self.config.seed
        number = draw_num_documents(self.config.documents, seed=seed, index=position)
        return select(prompt, number, draw_dropped(self.config.dropout, seed=seed, index=position))


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
