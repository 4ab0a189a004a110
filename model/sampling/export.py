"""`vimi-train export`: a checkpoint -> two files that need no checkpoint reader, and their reader.

model.safetensors   the generator's weights (or an average's) by name
config.json         all that rebuilds it: sizes, the training's config, identity of prompt encoder and space

Of a pretrained backbone both lie in `vimi/` and hold what was trained alone; around them lies what stock
diffusers loads without them (model/sampling/stock.py).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict

import torch
from safetensors.torch import load, save
from torch import Tensor

from infra.certificate import Certificate, check_files, entry_of, read_certificate, write_certificate
from infra.claim import open_job
from infra.config import Config, Incidental, Location
from infra.errors import ConfigError, DataError, TrainingError
from infra.storage import absolute, exists, join, read_bytes, read_json, write_bytes
from model.backbones.folder import TRANSFORMER
from model.backbones.pretrained import PretrainedGenerator
from model.generator import Generator
from model.latents import open_latents
from model.prompt.load import load_prompt_encoder
from model.sampling.maker import check_autoencoder, check_encoder
from model.sampling.stock import stock_files
from model.training.build import make_generator, space_in
from model.training.checkpoint import check_format, checkpoint_hash, find_checkpoint
from model.training.config import WEIGHTS, config_of
from model.training.state import Restored, check_average, restore_generator, trained_by, weights_of

WEIGHTS_FILE, CONFIG_FILE, OURS = "model.safetensors", "config.json", "vimi"


class ExportConfig(Config):
    """What to export."""

    run: Location
    """Folder of a run, or one of its checkpoints."""
    out: Incidental[Location]
    """Folder or URI of the export."""
    ema: str = WEIGHTS
    """`weights`, a stored average by name, or `power-<sigma_rel>`."""
    base: bool = True
    """Of a pretrained backbone: also its base, so that the folder is whole; false = the adapters alone."""


def check(config: ExportConfig) -> str:
    uri, _ = trained_by(config.run)
    check_average(uri, config.ema)
    return f"{config.ema} of {uri}"


def run(config: ExportConfig) -> Certificate:
    """Write the folder, read it back, certify that nothing differs."""
    check(config)
    uri = find_checkpoint(config.run)
    inputs = {"checkpoint": checkpoint_hash(uri)}
    done = open_job(config.out, job="export", config=config, inputs=inputs)
    if done is not None:
        return done
    restored = restore_generator(uri, ema=config.ema, device=torch.device("cpu"))
    files = []
    for path, data in contents(restored, config):
        write_bytes(join(config.out, path), data)
        files.append(entry_of(path, data))
    ours, theirs = named_weights(restored.model), named_weights(read_exported(config.out))
    if ours.keys() != theirs.keys() or not all(ours[name].equal(theirs[name]) for name in ours):
        raise TrainingError(f"{config.out}: the weights that were read back differ")
    certificate = Certificate(
        job="export",
        config_hash=config.hash(),
        num_in=1,
        num_out=1,
        files=files,
        inputs=inputs,
        facts={"checkpoint": uri, "ema": config.ema},
    )
    write_certificate(config.out, certificate)
    return certificate


def contents(restored: Restored, config: ExportConfig) -> Iterator[tuple[str, bytes]]:
    """Path in the export and bytes of each file."""
    model, inside = restored.model, ""
    if isinstance(model, PretrainedGenerator):
        if config.base:
            check_copied(model, restored)
        inside = f"{OURS}/"
        yield from stock_files(model, restored.config, with_base=config.base)
    values = {
        **restored.facts,
        "ema": config.ema,
        "backbone": {"class": type(model.backbone).__name__, **asdict(model.backbone_config)},
        "condition": asdict(model.condition_config),
    }
    yield inside + CONFIG_FILE, (json.dumps(values, indent=2) + "\n").encode()
    yield inside + WEIGHTS_FILE, save(named_weights(model), metadata={"format": "pt"})


def check_copied(model: PretrainedGenerator, restored: Restored) -> None:
    """Refuse parts of the base that were others in the training; `restore_generator` looks at the transformer.

    Raises:
        ConfigError: the autoencoder, or a text encoder that the run has learned with.
    """
    config = restored.config
    if config.autoencoder == model.backbone_config.model:
        check_autoencoder(open_latents(config.autoencoder), restored)
    if config.encoder.captions is not None:
        check_encoder(load_prompt_encoder(config.encoder), restored)


def load_exported(folder: str) -> Generator:
    """The generator of an exported folder, on the CPU, in eval mode.

    Raises:
        ConfigError: not an export.
        DataError: damaged.
    """
    certificate = read_certificate(folder, job="export")
    if certificate is None:
        raise ConfigError(f"no exported model at {folder}", cure="run `vimi-train export` first")
    check_files(folder, certificate.files)
    return read_exported(folder)


def read_exported(folder: str) -> Generator:
    """The same of a folder that is not certified yet; a base that lies in it is taken before the training's."""
    whole = absolute(folder)
    place = join(whole, OURS) if exists(join(whole, OURS, CONFIG_FILE)) else whole
    facts = read_json(join(place, CONFIG_FILE))
    check_format(facts, f"export {folder}")
    if exists(join(whole, TRANSFORMER)):
        facts["config"]["backbone"]["model"] = whole
    model = make_generator(config_of(facts, folder), facts["token_dim"], space_in(facts))
    weights = load(read_bytes(join(place, WEIGHTS_FILE)))
    if missing := named_weights(model).keys() ^ weights.keys():
        raise DataError(f"{folder}: weights {', '.join(sorted(missing)[:4])} are there or wanted, not both")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def named_weights(model: Generator) -> dict[str, Tensor]:
    """Parameters and buffers by plain name, on the CPU, contiguous."""
    return {
        name.removeprefix("model."): value.detach().cpu().contiguous()
        for name, value in weights_of(model).items()
    }
