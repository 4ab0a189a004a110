"""Folder or hub id of a pipeline of diffusers: configs, refusals, the hash of its weights."""

import hashlib
import importlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from infra.config import canonical_json
from infra.errors import ConfigError
from infra.hub import hub_file
from infra.pretrained import or_refused
from infra.storage import sha256_file
from model.backbones.families import FAMILIES
from model.backbones.family import Family

TRANSFORMER, SCHEDULER, INDEX = "transformer/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
"""Of a transformer, as diffusers loads it; those of large ones are listed in an index beside it."""
LEGAL = "a folder or hub id of a pipeline of diffusers (transformer, scheduler, vae, text_encoder, tokenizer)"


@dataclass(frozen=True)
class Base:
    """What a pipeline's folder says of itself."""

    place: str
    index: dict[str, Any]
    transformer: dict[str, Any]
    scheduler: dict[str, Any]

    @property
    def family(self) -> Family:
        return FAMILIES[self.transformer["_class_name"]]


@cache
def read_base(place: str) -> Base:
    """The configs of a pipeline, without its weights.

    Raises:
        ConfigError: not there, not readable, or no model that can be trained here; says what is legal.
    """
    transformer = _read(place, TRANSFORMER)
    base = Base(place, _read(place, INDEX, needed=False), transformer, _read(place, SCHEDULER, needed=False))
    name = transformer.get("_class_name")
    if name not in FAMILIES:
        raise ConfigError(
            f"backbone.model {place}: its transformer is a {name or 'config without a class'}",
            legal=", ".join(FAMILIES),
            cure="take such a model, or add its family: docs/training.md says how",
        )
    if transformer.get("quantization_config"):
        raise ConfigError(
            f"backbone.model {place} is quantised ({transformer['quantization_config'].get('quant_method')})",
            legal="weights in float32 or bfloat16",
            cure="take the model that it was made from",
        )
    try:
        why = base.family.refuse(transformer, base.index)
        base.family.sizes(transformer)
    except KeyError as error:
        raise ConfigError(f"{place}/{TRANSFORMER} says nothing of {error}") from None
    if why is not None:
        raise ConfigError(f"backbone.model {place} is {why}", legal=f"text to video by one {name}")
    return base


def _read(place: str, name: str, *, needed: bool = True) -> dict[str, Any]:
    folder = Path(place).expanduser()
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            if needed:
                raise ConfigError(f"backbone.model {place} holds no {name}", legal=LEGAL)
            return {}
    else:
        try:
            path = Path(hub_file(place, [name], wanted=f"backbone.model {place}", cure=f"give {LEGAL}"))
        except ConfigError:
            if needed:
                raise
            return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}", legal="a mapping")
    return found


def check_weights(base: Base) -> None:
    """Refuse a local folder whose transformer has not all weights of its class, by the heads of its files.

    Raises:
        ConfigError: a file or a tensor is missing, of another shape, or can't be read.
    """
    folder = Path(base.place).expanduser() / "transformer"
    if not folder.is_dir():
        return
    cure = "fetch the whole model, or save it with save_pretrained"
    with or_refused(f"backbone.model {base.place}: the transformer's weights can't be read", cure=cure):
        there, wanted = _stored_shapes(folder), _shapes(base.transformer)
    other = [name for name, shape in wanted.items() if there.get(name) != shape]
    if other:
        raise ConfigError(
            f"backbone.model {base.place}: {len(other)} of {len(wanted)} tensors of its transformer are "
            f"missing or of another shape, {other[0]} first",
            cure=cure,
        )


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in the files that diffusers would load."""
    from safetensors import safe_open

    files, listed = [WEIGHTS_FILE], folder / f"{WEIGHTS_FILE}.index.json"
    if listed.is_file():
        files = sorted(set(json.loads(listed.read_text())["weight_map"].values()))
    found: dict[str, list[int]] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            found |= {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return found


def _shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Name -> shape of all that a transformer of this config stores."""
    import torch

    cls: Any = getattr(importlib.import_module("diffusers"), config["_class_name"])
    with torch.device("meta"):
        return {name: list(value.shape) for name, value in cls.from_config(config).state_dict().items()}


def base_sha256(place: str) -> str:
    """Hex sha256 over the transformer's config and weights and what else `read_base` reads, as they are now.

    The scheduler's config says which process it was trained for.
    """
    folder = local_folder(place, ["transformer/*", SCHEDULER, INDEX])
    files = sorted(path for path in folder.glob("transformer/*") if path.suffix in (".json", ".safetensors"))
    files += [folder / name for name in (SCHEDULER, INDEX) if (folder / name).is_file()]
    names = (str(path.relative_to(folder)) for path in files)
    stats = [(name, (folder / name).stat()) for name in names]
    return _hash(str(folder), tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def local_folder(place: str, patterns: list[str] | None = None) -> Path:
    """The folder of a pipeline on this machine, fetched from the hub if it is an id; None = all its files.

    Raises:
        ConfigError: it can't be fetched.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    with or_refused(f"can't fetch backbone.model {place}", cure=f"the same command again, or give {LEGAL}"):
        return Path(snapshot_download(place, allow_patterns=patterns))


@cache
def _hash(folder: str, stats: tuple[tuple[str, int, int], ...]) -> str:
    listed = [[name, sha256_file(str(Path(folder) / name))] for name, _, _ in stats]
    return hashlib.sha256(canonical_json(listed)).hexdigest()
