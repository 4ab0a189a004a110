"""Export of a pretrained backbone in diffusers' own format, for its stock pipeline and no code of ours.

    model_index.json transformer/ vae/ ...   the base's pipeline, as it was (with `base: false` left out)
    pytorch_lora_weights.safetensors         the adapters, for `pipeline.load_lora_weights(folder)`

A base that was trained whole has no adapters: its transformer is the trained one.
"""

import importlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from model.backbones.folder import INDEX, SCHEDULER, Base, local_folder, read_base
from model.backbones.pretrained import ADAPTER, PretrainedGenerator
from model.training.config import StageConfig

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Where `load_lora_weights` looks first."""


def stock_files(
    model: PretrainedGenerator, config: StageConfig, *, with_base: bool
) -> Iterator[tuple[str, bytes]]:
    """Path in the export and bytes of each file, one in memory at a time."""
    base, is_whole = read_base(model.backbone_config.model), model.backbone_config.lora is None
    parts = components(base) if with_base else []
    transformer: Any = model.backbone
    if is_whole:
        yield from _saved(lambda folder: transformer.save_pretrained(Path(folder) / "transformer"))
    else:
        yield from _saved(lambda folder: _save_adapters(transformer, base.family.pipeline, folder))
    if not with_base:
        return
    parts = [part for part in parts if not (is_whole and part == "transformer")]
    folder = local_folder(base.place, [INDEX, *(f"{part}/*" for part in parts)])
    for place in (folder / INDEX, *(folder / part for part in parts)):
        for path in sorted(path for path in (place, *place.rglob("*")) if path.is_file()):
            name = path.relative_to(folder).as_posix()
            yield name, _scheduler(base, config) if name == SCHEDULER else path.read_bytes()


def components(base: Base) -> list[str]:
    """Folders of a pipeline that its index names: repositories hold other forms of the weights beside them.

    Raises:
        ConfigError: no index, without which no pipeline is loaded.
    """
    if not base.index:
        raise ConfigError(
            f"backbone.model {base.place} holds no {INDEX}, so that no pipeline could load its copy",
            cure="--set base=false, for the adapters alone",
        )
    return [name for name, value in base.index.items() if isinstance(value, list) and any(value)]


def _save_adapters(transformer: Any, pipeline: str, folder: str) -> None:
    peft, diffusers = (importlib.import_module(name) for name in ("peft", "diffusers"))
    getattr(diffusers, pipeline).save_lora_weights(
        folder,
        transformer_lora_layers=peft.get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
        transformer_lora_adapter_metadata=transformer.peft_config[ADAPTER].to_dict(),
        weight_name=LORA_FILE,
    )


def _saved(save: Any) -> Iterator[tuple[str, bytes]]:
    """What a writer of diffusers puts into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            data = path.read_bytes()
            if path.suffix == ".safetensors":
                data = sorted_metadata(data)
            yield path.relative_to(folder).as_posix(), data


def sorted_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: its writer draws one, so that no two files are alike."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _scheduler(base: Base, config: StageConfig) -> bytes:
    """The base's scheduler, with the shift of the times that the run was trained with."""
    values, shift = dict(base.scheduler), config.noise.get("shift")
    told: dict[str, Any] = {"shift": shift, "flow_shift": shift, "use_dynamic_shifting": False}
    if shift is not None:
        values |= {name: value for name, value in told.items() if name in values}
    return (json.dumps(values, indent=2) + "\n").encode()
