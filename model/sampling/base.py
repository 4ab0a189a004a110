"""A pretrained model as it is, before any training: the first thing to look at when training starts from one.

It is sampled as a run that has learned nothing yet would be, with the model's own text encoder alone.
"""

from collections.abc import Mapping
from typing import Any

import torch

from infra.errors import ConfigError
from model.backbones.folder import check_weights, read_base
from model.condition import Prompt
from model.latents import load_latents, outline_latents
from model.prompt.load import load_prompt_encoder
from model.prompt.own_text import check_own_text
from model.sampling.maker import GuidanceConfig, Maker
from model.training.build import make_generator
from model.training.config import WEIGHTS, Stage1Config, StageConfig
from model.training.pretrained import pretrained_of


def with_defaults(values: Any) -> Any:
    """Values of a sampling; of a base model with what its stock pipeline makes where they don't say it.

    Raises:
        ConfigError: no such model, or none that can be trained here.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("base"), str):
        return values
    base = read_base(values["base"])
    stock = base.family.defaults(base.transformer)
    said = {name: value for name, value in values.items() if value is not None}
    if isinstance(said.get("guidance"), Mapping):
        said["guidance"] = {**stock["guidance"], **said["guidance"]}
    return {**values, **stock, **said}


def untrained(model: str, *, num_frames: int, size_px: tuple[int, int]) -> Stage1Config:
    """What a run that starts from a pretrained model is before its first step, at a shape of pixels.

    Its adapters answer 0, so that the base is frozen and as it is; on a GPU it is kept in bfloat16.
    """
    return Stage1Config.model_validate(
        {
            "prompts": "",
            "out": "",
            "backbone": {"kind": "diffusers", "model": model, "text": "native"},
            "num_frames": num_frames,
            "height_px": size_px[0],
            "width_px": size_px[1],
            "references": "faithful",
            "documents": [0],
            "parallel": {"dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
        }
    )


def check_base(stage: StageConfig, prompts: list[Prompt], *, ema: str) -> None:
    """Refuse what a base model can't have, by its configs alone.

    Raises:
        ConfigError: a part is missing, a size that it can't make, an average, or pictures in a prompt.
    """
    if stage.pretrained is None:
        raise ValueError("a stage without a base model")
    place = stage.pretrained.model
    if ema != WEIGHTS:
        raise ConfigError(f"ema {ema!r} of the base model {place}", legal=WEIGHTS)
    if any(segment.image for prompt in prompts for segment in prompt):
        raise ConfigError(
            f"a picture in a prompt of the base model {place}",
            legal="words: what pictures mean to it is learned in training",
        )
    check_own_text(place)
    check_weights(read_base(place))
    pretrained_of(stage, stage.pretrained, outline_latents(place)[0])


def open_base(stage: StageConfig, guidance: GuidanceConfig, device: torch.device) -> Maker:
    """The base model with its own text encoder and autoencoder, loaded."""
    encoder = load_prompt_encoder(stage.encoder, device)
    latents = load_latents(str(stage.autoencoder), device)
    model = make_generator(stage, encoder.dim, latents.space).to(device).eval()
    return Maker(model, stage, encoder, latents, guidance)
