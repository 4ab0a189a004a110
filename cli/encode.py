"""`vimi-data encode`: gives the pipeline's job the trainer's encoders.

The two floors don't know each other: this file hands the job a factory that a worker calls once.
"""

import shlex
from functools import partial
from typing import Any

from cli.common import shorten
from cli.recipes import options, recipe, unused
from infra.certificate import Certificate
from infra.config import read_yaml
from model.backbones.config import with_base
from model.data.inputs import InputConfig
from model.encodings.make import describe_inputs, make_row_encoder
from model.training.build import measure_space
from pipeline.prompts import encode


class EncodeConfig(encode.EncodeJobConfig, InputConfig):
    """Everything of a stage's config that decides what a sample's tensors are, and where they go."""


def check(config: EncodeConfig) -> str:
    """Refuse what can't work before Ray starts; the plan in words."""
    shards = encode.check(config)
    space = measure_space(config, reach=False)
    described = describe_inputs(config)
    targets = f"; targets as {space.channels}-channel latents" if space.is_latent else ""
    return (
        f"{shards.num_rows:,} prompts in {len(shards):,} row groups, each with {described['documents']} "
        f"documents; {len(described['dropped'])} sets of dropped kinds{targets}"
    )


def run(config: EncodeConfig) -> Certificate:
    measure_space(config)  # an autoencoder that can't be loaded is told before Ray starts
    values = config.model_dump(mode="json", include=set(InputConfig.model_fields))
    make = partial(make_row_encoder, values, "cuda" if config.num_gpus else "cpu")
    return encode.run(config, make, facts={"inputs": describe_inputs(config)})


def then(stage: str | None, config: EncodeConfig) -> str:
    """The training that reads the encodings: by the same config, or by the small recipe with these inputs."""
    words = words_of(stage or recipe("stage1"))
    name = "stage2" if "start_from" in words else "stage1"
    own = {key: value for key, value in words.items() if key in InputConfig.model_fields}
    known = InputConfig.model_validate({"prompts": config.prompts} | own)
    here, there = config.model_dump(mode="json"), known.model_dump(mode="json")
    other = {key: here[key] for key in there if key != "prompts" and here[key] != there[key]}
    file = shlex.quote(shorten(stage or recipe("stage1")))
    return (
        f"vimi-train {name} {{c.prompts}} --config {file}{options(other)} --set encodings={{c.out}} "
        f"--out {unused(f'runs/{name}')}"
    )


def options_of(stage: str) -> dict[str, Any]:
    """The fields of a stage's config file that encoding shares with it."""
    return {name: value for name, value in words_of(stage).items() if name in InputConfig.model_fields}


def words_of(stage: str) -> dict[str, Any]:
    """A stage's config file, with what follows from a pretrained backbone."""
    return with_base(read_yaml(stage))
