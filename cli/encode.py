"""`vimi-data encode`: the job is of the data side, the encoders are the trainer's; here they meet.

The two floors don't know each other: this file hands the job a factory that a worker calls once.
"""

from functools import partial
from typing import Any

from infra.config import read_yaml
from infra.storage import Certificate, absolute
from model.data.inputs import InputConfig
from model.encodings.check import describe_inputs
from model.encodings.make import make_row_encoder
from model.latents import resolve_latents
from model.training.door import resolve_encoder
from model.training.targets import open_space
from pipeline.prompts.encode import EncodeJobConfig
from pipeline.prompts.encode import check as check_job
from pipeline.prompts.encode import run as run_job


class EncodeConfig(EncodeJobConfig, InputConfig):
    """Everything of a stage's config that decides what a sample's tensors are, and where they go."""


def check(config: EncodeConfig) -> str:
    """Refuse what can't work before Ray starts; the plan in words."""
    config = resolve(config)
    shards = check_job(config)
    space = open_space(config)
    described = describe_inputs(config)
    targets = f"; targets as {space.channels}-channel latents" if space.is_latent else ""
    return (
        f"{shards.num_rows:,} prompts in {len(shards):,} row groups, each with {described['documents']} "
        f"documents; {len(described['dropped'])} sets of dropped kinds{targets}"
    )


def run(config: EncodeConfig) -> Certificate:
    config = resolve(config)
    names = set(InputConfig.model_fields)
    values = config.model_dump(mode="json", include=names)
    device = "cuda" if config.num_gpus else "cpu"
    facts = {"inputs": describe_inputs(config)}
    return run_job(config, partial(make_row_encoder, values, device), facts=facts, hash_exclude=set())


def resolve(config: EncodeConfig) -> EncodeConfig:
    """The same with absolute places: workers run in a folder of their own."""
    update: dict[str, Any] = {name: absolute(getattr(config, name)) for name in ("prompts", "out")}
    encoder, latents = resolve_encoder(config.encoder), resolve_latents(config.autoencoder)
    return config.model_copy(update={**update, "encoder": encoder, "autoencoder": latents})


def options_of(stage: str) -> dict[str, Any]:
    """The fields of a stage's config file that encoding shares with it."""
    return {name: value for name, value in read_yaml(stage).items() if name in InputConfig.model_fields}
