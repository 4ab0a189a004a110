"""The second stage of the cascade: what its shards must hold, and the base model that it starts with."""

from typing import Any

import torch

from infra.errors import ConfigError
from model.data.shards import Shards, open_parquet
from model.generator import Generator, start_upsampler
from model.training.checkpoint import find_checkpoint
from model.training.stages import StageConfig, UpsamplerConfig

SIZES = ["target.kind", "target.height_px", "target.width_px", "height_px", "width_px"]


def check_upsampler(config: StageConfig, shards: Shards) -> None:
    """Refuse shards whose targets are stored smaller than the upsampler's output, and a missing base.

    `frames` targets have one size for all rows; `video` and `reference` targets are as large as their
    source, so they serve. The first row group speaks for all.

    Raises:
        ConfigError: only small frames, no source as large as the output, or no base model.
    """
    if config.upsampler is None:
        return
    if config.upsampler.start_from is not None:
        find_checkpoint(config.upsampler.start_from)
    group = shards.groups[0]
    rows = open_parquet(group.uri).read_row_group(group.index, columns=SIZES).to_pylist()
    wanted = (config.height_px, config.width_px)
    stored = {_size(row) for row in rows}
    if any(_serves(size, wanted) for size in stored):
        return
    kinds = {row["target"]["kind"] for row in rows}
    largest = max(stored, key=lambda size: size[0] * size[1])
    cure = (
        "make them again with vimi-data augment --set target.kind=video (or reference, or a larger "
        f"target.height_px and width_px), from sources of at least {wanted[0]} x {wanted[1]}"
    )
    raise ConfigError(
        f"{config.prompts} holds {' and '.join(sorted(kinds))} of at most {largest[0]} x {largest[1]} pixels "
        f"(height x width), the upsampler learns to make {wanted[0]} x {wanted[1]}",
        legal="targets at least that large",
        cure=cure,
    )


def _size(row: dict[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of what a row's target can give."""
    target = row["target"]
    return (
        target["height_px"] or row["height_px"] or 0,
        target["width_px"] or row["width_px"] or 0,
    )


def _serves(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Whether a picture of `size`, scaled to cover `wanted`, is not enlarged."""
    return size[0] >= wanted[0] and size[1] >= wanted[1]


def start_from_base(generator: Generator, config: UpsamplerConfig) -> list[str]:
    """Copy a base model's weights into a fresh upsampler (Snap Video: "initialised from base").

    Returns:
        Names of the tensors that have no counterpart and keep their own start.

    Raises:
        ConfigError: the base model works on another number of channels, or isn't there.
    """
    if config.start_from is None:
        return []
    from model.sampling.restore import restore_generator

    ema = config.start_ema or "weights"
    base = restore_generator(config.start_from, ema=ema, device=torch.device("cpu"))
    mine, theirs = generator.backbone_config, base.model.backbone_config
    if (mine.out_channels, type(mine)) != (theirs.out_channels, type(theirs)):
        raise ConfigError(
            f"{config.start_from} makes {theirs.out_channels} channels by a {type(theirs).__name__}",
            legal=f"a base model of {mine.out_channels} channels and a {type(mine).__name__}",
        )
    return start_upsampler(generator, base.model)
