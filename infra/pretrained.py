"""Frozen networks of transformers by folder or name on the hub: found before work starts, loaded in workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import ConfigError, first_line
from infra.hub import hub_file, require_hub_file
from infra.storage import sha256_file

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"


def find_pretrained(place: str, what: str, *, field: str) -> str:
    """What transformers would load, in words; `field` is the config's, for the cure.

    Raises:
        ConfigError: no folder, not in the cache of the hub, and the hub can't be reached.
    """
    if not Path(place).is_dir():
        require_hub_file(place, [CONFIG_FILE], wanted=f"{what} {place}", cure=_cure(field))
    return f"{what} {place}"


def read_model_type(place: str, what: str, *, field: str) -> str:
    """The family that a model is of, as its config.json says; of the weights nothing is read.

    Raises:
        ConfigError: as `find_pretrained`, or its config.json is not transformers'.
    """
    file = Path(_config_file(place, what, field))
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{what} {place} has no {CONFIG_FILE} of transformers: {first_line(error)}", cure=_cure(field)
        ) from None


def weights_version(place: str, what: str, *, field: str) -> str:
    """What the weights are, whatever the folder is called: a hash of its files, or the hub's name and commit.

    Raises:
        ConfigError: as `find_pretrained`.
    """
    config = Path(_config_file(place, what, field))
    if not Path(place).is_dir():
        return f"{place}@{config.parent.name}"
    files = sorted(file for file in config.parent.iterdir() if file.is_file())
    digests = [f"{file.name} {sha256_file(str(file))}" for file in files]
    return sha256("\n".join(digests).encode()).hexdigest()


def hash_stored_weights(folder: str | Path) -> str:
    """Hex sha256 over names, types, shapes and bytes of the tensors in a folder's weight files.

    It doesn't hang on how they are dealt to files, nor on the type that they are rounded to when loaded. Files
    of other formats count by their bytes.
    """
    import torch
    from safetensors import safe_open

    digest, files = sha256(), sorted(Path(folder).iterdir())
    opened = [safe_open(file, framework="pt") for file in files if file.suffix == ".safetensors"]
    tensors = [(name, place) for place, file in enumerate(opened) for name in file.keys()]  # noqa: SIM118
    for name, place in sorted(tensors):
        value = opened[place].get_tensor(name)
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy()))
    for file in files:
        if file.suffix in (".bin", ".pt", ".pth"):
            digest.update(f"{file.name} {sha256_file(str(file))}\n".encode())
    return digest.hexdigest()


def _config_file(place: str, what: str, field: str) -> str:
    if Path(place).is_dir():
        return str(Path(place) / CONFIG_FILE)
    return hub_file(place, [CONFIG_FILE], wanted=f"{what} {place}", cure=_cure(field))


def _cure(field: str) -> str:
    return f"set {field} to a folder that holds it, or fetch it where there is a network"


def load_pretrained(
    place: str, what: str, *, processor: Any, model: Any, device: str | torch.device, **how: Any
) -> tuple[Any, Any]:
    """(preprocessing, frozen network) of a folder or hub name, by their classes of transformers.

    Raises:
        ConfigError: they can't be loaded.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    with or_refused(f"can't load {what} {place}"):
        network = model.from_pretrained(place).eval().requires_grad_(False).to(device)
        return processor.from_pretrained(place, **how), network


@contextmanager
def or_refused(words: str, *, legal: str = "", cure: str = "") -> Iterator[None]:
    """Make a line of whatever another library raises when a folder's files are not as it wrote them.

    Raises:
        ConfigError: `words`, and the first line of what was raised.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - each parser has kinds of its own, and some a bare Exception
        raise ConfigError(f"{words}: {first_line(error)}", legal=legal, cure=cure) from None


@contextmanager
def exactly() -> Iterator[None]:
    """Inference in full float32, by kernels that give the same bits each time: a GPU's convolutions would round
    to TF32.
    """
    import torch

    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), flags:
        yield
