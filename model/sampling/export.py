"""`vimi-train export`: a checkpoint -> safetensors in a diffusers-style folder, read back without difference.

model_index.json                         what is in the folder, and which class reads it
transformer/config.json                  the network's sizes
transformer/diffusion_pytorch_model.safetensors
scheduler/scheduler_config.json          the diffusion process, in diffusers' words where it has them
prompt_encoder/config.json               which frozen encoder, and its hash
vae/                                     in latent space: the autoencoder, as diffusers keeps it
"""

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from infra.claim import open_job
from infra.config import Config
from infra.errors import ConfigError, TrainingError
from infra.storage import (
    VERSION,
    Certificate,
    FileEntry,
    absolute,
    exists,
    join,
    read_bytes,
    read_json,
    write_bytes,
    write_certificate,
)
from model.condition import ConditionConfig
from model.dit import DitConfig
from model.fit_layout import FitConfig
from model.generator import Generator
from model.latents import open_latents
from model.sampling.maker import check_autoencoder
from model.sampling.restore import WEIGHTS, Restored, check_average, named_weights, restore_generator
from model.training.checkpoint import COMMITTED, find_checkpoint
from model.training.targets import describe_space, edm_of

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
BACKBONES = {"fit": FitConfig, "dit": DitConfig}


class ExportConfig(Config):
    """What to export."""

    run: str
    """Folder of a run, or one of its checkpoints."""
    out: str
    """Folder or URI of the export."""
    ema: str = WEIGHTS
    """`weights`, a stored average by name, or `power-<sigma_rel>`."""


def check(config: ExportConfig) -> str:
    uri = find_checkpoint(absolute(config.run))
    check_average(uri, config.ema)
    return f"{config.ema} of {uri}"


def run(config: ExportConfig) -> Certificate:
    """Write the folder, read it back, certify that nothing differs."""
    check(config)
    config = config.model_copy(update={"out": absolute(config.out), "run": absolute(config.run)})
    uri = find_checkpoint(config.run)
    inputs = {"checkpoint": hashlib.sha256(read_bytes(join(uri, COMMITTED))).hexdigest()[:16]}
    done = open_job(config.out, job="export", config=config, inputs=inputs)
    if done is not None:
        return done
    restored = restore_generator(uri, ema=config.ema, device=torch.device("cpu"))
    files = []
    for path, data in contents(restored, config.ema).items():
        write_bytes(join(config.out, path), data)
        sha256 = hashlib.sha256(data).hexdigest()
        files.append(FileEntry(path=path, rows=1, num_bytes=len(data), sha256=sha256))
    difference = largest_difference(restored.model, load_exported(config.out))
    if difference:
        raise TrainingError(f"{config.out}: reloaded weights differ by {difference}")
    certificate = Certificate(
        job="export",
        config_hash=config.hash(exclude={"out"}),
        num_in=1,
        num_out=1,
        files=files,
        inputs=inputs,
        facts={"reload_difference": difference, "checkpoint": uri, "ema": config.ema},
    )
    write_certificate(config.out, certificate)
    return certificate


def contents(restored: Restored, ema: str) -> dict[str, bytes]:
    """Path in the export -> bytes."""
    model, trained = restored.model, restored.config
    backbone = model.backbone_config
    kind = "fit" if isinstance(backbone, FitConfig) else "dit"
    edm = edm_of(trained, (backbone.num_frames, backbone.out_channels, backbone.height_px, backbone.width_px))
    index = {
        "_class_name": "VimiPipeline",
        "_vimi_version": VERSION,
        "transformer": ["model.sampling.export", "load_exported"],
        "scheduler": ["diffusers", "EDMEulerScheduler"],
        "checkpoint": {"position": restored.facts["position"], "stage": trained.stage, "ema": ema},
    }
    network = {
        "_class_name": "Generator",
        "kind": kind,
        "backbone": asdict(backbone),
        "condition": asdict(model.condition_config),
    }
    scheduler = {
        "_class_name": "EDMEulerScheduler",
        "sigma_min": edm.sigma_min,
        "sigma_max": edm.sigma_max,
        "sigma_data": edm.sigma_data,
        "rho": edm.rho,
        "prediction_type": "v_prediction",
        "sigma_in": edm.sigma_in,
    }
    if restored.space.is_latent:
        index["vae"] = describe_space(restored.space)
    encoder = {**trained.encoder.model_dump(mode="json"), "identity_hash": restored.facts["encoder"]}
    return {
        "model_index.json": _json(index),
        "transformer/config.json": _json(network),
        f"transformer/{WEIGHTS_FILE}": save(named_weights(model), metadata={"format": "pt"}),
        "scheduler/scheduler_config.json": _json(scheduler),
        "prompt_encoder/config.json": _json(encoder),
        "vimi_config.yaml": trained.to_yaml().encode(),
        **autoencoder_files(restored),
    }


def autoencoder_files(restored: Restored) -> dict[str, bytes]:
    """The autoencoder as diffusers writes it, below `vae/`; nothing for a model of pixels."""
    latents = open_latents(restored.config.autoencoder) if restored.space.is_latent else None
    if latents is None:
        return {}
    check_autoencoder(latents.space.identity, restored)
    with tempfile.TemporaryDirectory() as folder:
        latents.model.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {f"vae/{path.relative_to(folder)}": path.read_bytes() for path in files}


def load_exported(folder: str) -> Generator:
    """The generator of an exported folder, on the CPU, in eval mode.

    Raises:
        ConfigError: not an export.
    """
    place = join(absolute(folder), "transformer", "config.json")
    if not exists(place):
        raise ConfigError(f"no exported model at {folder}", cure="run `vimi-train export` first")
    values = read_json(place)
    backbone = BACKBONES[values["kind"]](**values["backbone"])
    model = Generator(backbone, ConditionConfig(**values["condition"]))
    weights = load(read_bytes(join(absolute(folder), "transformer", WEIGHTS_FILE)))
    model.load_state_dict(weights)
    return model.eval()


def largest_difference(one: Generator, two: Generator) -> float:
    """Largest absolute difference over all weights; infinite when their names differ."""
    left, right = named_weights(one), named_weights(two)
    if left.keys() != right.keys():
        return float("inf")
    pairs = ((left[name].double(), right[name].double()) for name in left)
    return max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
