"""Folder or hub id of a pipeline of diffusers: configs, refusals, the hash of its weights."""

import hashlib
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
    why = base.family.refuse(transformer, base.index)
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
    """Refuse a local folder whose transformer has a config and no weights.

    Raises:
        ConfigError: there are none.
    """
    folder = Path(base.place).expanduser()
    if folder.is_dir() and not any((folder / "transformer").glob("*.safetensors")):
        raise ConfigError(
            f"backbone.model {base.place}: no *.safetensors in transformer",
            cure="fetch the whole model, or save it with save_pretrained",
        )


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
