"""What a training with a pretrained backbone costs, by its config alone, without its weights."""

import importlib
import json
from dataclasses import replace
from typing import Any

import torch

from infra.errors import ConfigError
from infra.pretrained import or_refused
from model.backbones.pretrained import Pretrained
from model.condition import ConditionConfig
from model.cost import NO_REFERENCES, activation_bytes, gib, on_meta, scaled, section, training_flops
from model.latents import outline_latents
from model.training.build import condition_config, most_references, reference_shape
from model.training.config import StageConfig
from model.training.pretrained import check_targets, pretrained_of

GPUS_GB = (24, 48, 80, 141)
SPARE = 0.1
"""Of a GPU's memory, for what is not counted: kernels' workspaces, fragments, the context (ours)."""
TOKEN_DIM = 1024
"""Width of the prompt encoder's tokens that is assumed."""


def describe_training(config: StageConfig, *, batch: int = 1) -> dict[str, Any]:
    """Parameters, memory by part and FLOPs of one rank that holds `batch` samples at once.

    Raises:
        ConfigError: no pretrained backbone, or one that can't be read.
    """
    if config.pretrained is None or config.autoencoder is None:
        raise ConfigError("a config with a preset", cure="vimi-train describe --preset NAME")
    space, in_autoencoder = outline_latents(config.autoencoder)
    backbone = pretrained_of(config, config.pretrained, space)
    if backbone.lora is not None:
        check_targets(backbone, backbone.lora.targets)
    condition, seen = condition_config(config, TOKEN_DIM, space), most_references(config)
    sizes: dict[str, Any] = {"prompt_tokens": backbone.kind.text_tokens // 2, "references": NO_REFERENCES}
    if seen:
        sizes["references"] = (seen, *reference_shape(config, space)[1:])
    half, own = config.parallel.dtype == "bfloat16", config.pretrained.reads_captions
    numbers = count(backbone, condition)
    activations = [activation_bytes(backbone, condition, batch=n, half=half, **sizes) for n in (1, 2)]
    ranks = config.num_workers if isinstance(config.num_workers, int) else 1
    shards = ranks if config.parallel.mode == "fsdp" else 1
    state = state_bytes(backbone, numbers, num_emas=len(config.ema), shards=shards)
    frozen = {"autoencoder": in_autoencoder, "text encoder": count_text_encoder(config) if own else 0}
    encoders = {name: number * (2 if half else 4) for name, number in frozen.items() if number}
    return {
        "model": config.pretrained.model,
        "family": backbone.family,
        "clip": [config.num_frames, config.height_px, config.width_px],
        "latents": [backbone.num_frames, backbone.height_px, backbone.width_px],
        "parameters": numbers | {f"{name} (frozen)": number for name, number in frozen.items() if number},
        "tokens": backbone.tokens() | reference_tokens(backbone, seen),
        "flops": training_flops(backbone, condition, **sizes),
        "batch": batch,
        "state": state,
        "encoders": encoders,
        "activations": {name: at_batch(activations, name, batch) for name in activations[0]},
        "fits": {
            size: fits(size, sum(state.values()), activations, config.parallel.recompute) for size in GPUS_GB
        },
    }


def reference_tokens(backbone: Pretrained, references: int) -> dict[str, int]:
    """Each is a latent frame of its own, behind the video's."""
    one = replace(backbone, num_frames=backbone.kind.sizes(json.loads(backbone.architecture)).patch[0])
    return {f"{references} reference(s)": references * one.tokens()["video"]} if references else {}


def count(backbone: Pretrained, condition: ConditionConfig) -> dict[str, int]:
    """Parameters that are trained, and that stay."""
    model = on_meta(backbone, condition)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, "frozen": sum(p.numel() for p in model.parameters()) - trained}


def count_text_encoder(config: StageConfig) -> int:
    """Parameters of the model's own text encoder, by its config."""
    from transformers import AutoConfig

    if config.pretrained is None:
        return 0
    place = config.pretrained.model
    with or_refused(f"can't read the text encoder of {place}"):
        values: Any = AutoConfig.from_pretrained(place, subfolder="text_encoder")
    cls = getattr(importlib.import_module("transformers"), values.architectures[0])
    with torch.device("meta"):
        return sum(p.numel() for p in cls(values).parameters())


def state_bytes(
    backbone: Pretrained, numbers: dict[str, int], *, num_emas: int, shards: int = 1
) -> dict[str, int]:
    """Bytes that a rank holds whatever its batch; what is trained is float32, in weights and moments.

    `shards`: ranks over which FSDP2 spreads all of it.
    """
    trained = 4 * numbers["trained"] // shards
    return {
        "base": numbers["frozen"] * (2 if backbone.half_base else 4) // shards,
        "trained weights": trained,
        "gradients": trained,
        "optimizer (2 moments)": 2 * trained,
        f"{num_emas} average(s)": num_emas * trained,
    }


def at_batch(activations: list[dict[str, int]], name: str, batch: int) -> int:
    """Bytes at any batch: they grow by as much with each sample."""
    one, two = (each[name] for each in activations)
    return one + (batch - 1) * (two - one)


def fits(size_gb: int, state: int, activations: list[dict[str, int]], recompute: bool) -> int:
    """The largest batch of a rank on a GPU of so many GB (10^9 bytes), encodings made beforehand; 0 = none."""
    name = "checkpointed" if recompute else "stored"
    one = activations[0][name]
    each = max(1, activations[1][name] - one)
    room = size_gb * 10**9 * (1 - SPARE) - state - one
    return int(room // each) + 1 if room >= 0 else 0


def render(d: dict[str, Any], *, recompute: bool) -> str:
    """The page, as text for a terminal."""
    clip, latents = (" x ".join(map(str, d[name])) for name in ("clip", "latents"))
    how = "blocks computed again in the backward pass" if recompute else "all activations kept"
    lines = [
        f"{d['model']}: {d['family']}, {clip} pixels as {latents} latents",
        *section("parameters", {name: scaled(value) for name, value in d["parameters"].items()}),
        *section("tokens of a sample", {name: f"{value:,}" for name, value in d["tokens"].items()}),
        *section("FLOPs of a training sample", {name: scaled(value) for name, value in d["flops"].items()}),
        *section(
            "memory of a rank, whatever its batch", {name: gib(value) for name, value in d["state"].items()}
        ),
        *section(f"activations of {d['batch']} sample(s)", {k: gib(v) for k, v in d["activations"].items()}),
        *section("encoders, unless `vimi-data encode` ran", {k: gib(v) for k, v in d["encoders"].items()}),
        *section(
            f"samples of a rank that fit, {how}",
            {f"on {size} GB": str(number or "none") for size, number in d["fits"].items()},
        ),
        "  computed, not measured, with as many references as a sample can have",
    ]
    return "\n".join(lines)
