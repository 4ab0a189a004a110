"""What a config with a pretrained backbone asks for: its sizes, and what is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace

import torch

from infra.errors import ConfigError
from model.backbones.config import DiffusersConfig
from model.backbones.family import Scale
from model.backbones.folder import read_base
from model.backbones.pretrained import Lora, Pretrained
from model.data.batch import Role, role_number
from model.space import Space
from model.training.config import StageConfig

OWN_ROOM = 128
"""Places of a text that are left to the model's own states where our tokens follow them: what LTX's pipeline
gives a caption. Ours for Wan; of a longer caption the last of our tokens are cut."""


def pretrained_of(config: StageConfig, chosen: DiffusersConfig, space: Space) -> Pretrained:
    """The same of a pretrained backbone: its own architecture, called at the shape of the clip.

    Raises:
        ConfigError: no such model, or latents of another number or size than it takes.
    """
    base = read_base(chosen.model)
    sizes = base.family.sizes(base.transformer)
    _, rows, columns = sizes.patch
    frames, channels, height, width = space.shape(config.num_frames, config.height_px, config.width_px)
    if channels != sizes.channels:
        raise ConfigError(
            f"backbone.model {chosen.model} takes latents of {sizes.channels} channels, the autoencoder "
            f"{config.autoencoder} makes {channels}",
            legal="the autoencoder that it was trained with: leave `autoencoder` out",
        )
    for bucket in config.shapes:
        _, _, h, w = space.shape(bucket.num_frames, bucket.height_px, bucket.width_px)
        if h % rows or w % columns:
            raise ConfigError(
                f"{bucket.height_px} x {bucket.width_px} pixels are {h} x {w} latents, which don't divide into "
                f"patches of {rows} x {columns}",
                legal=f"multiples of {space.factor_px * rows} x {space.factor_px * columns} (height x width)",
            )
    lora, targets = chosen.lora, base.family.lora_targets
    return Pretrained(
        num_frames=frames,
        height_px=height,
        width_px=width,
        in_channels=channels,
        out_channels=channels,
        condition_dim=sizes.text_dim,
        checkpoint=config.parallel.recompute,
        model=chosen.model,
        family=base.family.transformer,
        architecture=json.dumps(base.transformer, sort_keys=True),
        text=chosen.text,
        lora=Lora(lora.rank, lora.alpha or lora.rank, lora.targets or targets) if lora else None,
        half_base=lora is not None and config.parallel.dtype == "bfloat16",
        scale=Scale(space.factor_px, space.factor_frames),
        first_frame=role_number(Role.FIRST_FRAME),
        one_by_one=config.parallel.mode != "ddp",
    )


def check_pretrained(config: StageConfig, chosen: DiffusersConfig, space: Space) -> Pretrained:
    """Refuse adapters of layers that the base doesn't have, and prompts that don't fit into its text.

    Raises:
        ConfigError: one line: what is wrong, what is legal, how to cure it.
    """
    backbone, base = pretrained_of(config, chosen, space), read_base(chosen.model)
    if chosen.text == "append" and base.family.has_text_mask:
        raise ConfigError(
            f"backbone.text append: {base.family.transformer} hides the padding that our tokens would take, so "
            "that step 0 would not be the base model",
            legal="replace or native",
        )
    own = OWN_ROOM if chosen.text == "append" else 0
    length, most = base.family.text_tokens - own, config.encoder.max_tokens
    if most > length and chosen.text != "native":
        raise ConfigError(
            f"encoder.max_tokens {most}, but {base.family.transformer} reads texts of {length + own}"
            + (f", of which {own} are left to its own words" if own else ""),
            legal=f"at most {length}",
            cure=f"--set encoder.max_tokens={length}",
        )
    sizes = {config.reference_size_px, *((b.height_px, b.width_px) for b in config.shapes)}
    if config.references == "plus" and len(sizes) > 1:
        raise ConfigError(
            f"references: plus with pictures and buckets of sizes {' and '.join(map(str, sorted(sizes)))}",
            legal=f"one size, as a reference is a frame of {base.family.transformer}; or references: faithful",
        )
    if config.references == "plus" and config.parallel.mode != "ddp" and isinstance(config.num_workers, tuple):
        raise ConfigError(
            f"num_workers {list(config.num_workers)}, parallel.mode {config.parallel.mode}, references: plus",
            legal="a fixed number: videos go one by one, as often on every rank",
        )
    if chosen.lora is not None:
        check_targets(backbone, chosen.lora.targets)
    return backbone


def check_targets(backbone: Pretrained, targets: Sequence[str]) -> None:
    """Refuse ends of names that no linear layer of the base has, each by itself."""
    with torch.device("meta"):
        bare = replace(backbone, lora=None).build()
    names = [name for name, part in bare.named_modules() if isinstance(part, torch.nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"backbone.lora.targets {target!r}: no linear layer of {backbone.family} is called so",
                legal=", ".join(dict.fromkeys(map(_end, names))),
            )


def _end(name: str) -> str:
    """`blocks.0.attn1.to_out.0` -> `to_out.0`: the shortest end that says more than a number."""
    *_, before, last = ["", *name.split(".")]
    return f"{before}.{last}" if last.isdigit() else last
