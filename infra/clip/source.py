"""Where a CLIP's files are: names, tags, hub ids and local paths, resolved or refused.

Every way in ends in one `Source`, from which `load.py` builds.
"""

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from infra.clip.config import OFFLINE, ClipConfig
from infra.clip.hub import hub_file, require_hub_file, url_file
from infra.errors import ConfigError

HUB_PREFIX = "hf-hub:"


@dataclass(frozen=True)
class Source:
    """All that is needed to build a model."""

    name: str
    model_cfg: dict[str, Any]
    checkpoint: str
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """Where relative tokenizer names are looked up first."""


def find_source(config: ClipConfig) -> Source:
    """Resolve names to files, fetching them from the hub when they are not in its cache."""
    if config.name.startswith(HUB_PREFIX):
        return _from_hub(config.name)
    if config.name.endswith(".json"):
        return _from_files(Path(config.name).expanduser(), config.pretrained)
    return _from_open_clip(config.name.replace("/", "-"), config.pretrained)


def check_clip(config: ClipConfig) -> None:
    """Refuse what can be refused without loading weights: names, tags, local files, a hub out of reach.

    Fetches nothing; asks the network (once, seconds) only when the weights are not in the local cache.

    Raises:
        ConfigError: as `load_clip`.
    """
    if config.name == OFFLINE:
        from infra.clip.offline import lite0_file, minilm_folder

        minilm_folder()
        lite0_file()
    elif config.name.endswith(".json"):
        _from_files(Path(config.name).expanduser(), config.pretrained)
    elif config.name.startswith(HUB_PREFIX):
        repository = config.name.removeprefix(HUB_PREFIX)
        require_hub_file(repository, ["open_clip_config.json"], wanted=config.name)
    else:
        _check_tag(config.name.replace("/", "-"), config.pretrained)


def _check_tag(name: str, pretrained: str) -> None:
    from open_clip import get_pretrained_cfg

    _check_names(name, pretrained)
    repository, _, file = get_pretrained_cfg(name, pretrained).get("hf_hub", "").rpartition("/")
    if repository and not Path(pretrained).expanduser().is_file():
        require_hub_file(repository, _weight_names(file), wanted=f"{name}/{pretrained}")


def _from_hub(name: str) -> Source:
    repository = name.removeprefix(HUB_PREFIX)
    values = _read_json(hub_file(repository, ["open_clip_config.json"], wanted=name))
    if "model_cfg" not in values:
        raise ConfigError(f"{name} is not an open_clip model: no model_cfg in its open_clip_config.json")
    checkpoint = hub_file(repository, _weight_names(""), wanted=name)
    return Source(name, values["model_cfg"], checkpoint, values.get("preprocess_cfg", {}))


def _from_files(config_file: Path, checkpoint: str) -> Source:
    """A model config: open_clip's own, or an `open_clip_config.json` with `preprocess_cfg`."""
    if not config_file.is_file():
        raise ConfigError(f"no model config at {config_file}", legal="an open_clip model config (.json)")
    weights = Path(checkpoint).expanduser()
    if not weights.is_file():
        raise ConfigError(
            f"no checkpoint at {checkpoint!r} for the model config {config_file}",
            cure="set pretrained to the path of the weights",
        )
    values = _read_json(str(config_file))
    model_cfg = values.get("model_cfg", values)
    lacking = {"embed_dim", "vision_cfg", "text_cfg"} - model_cfg.keys()
    if lacking:
        raise ConfigError(
            f"{config_file} is no open_clip model config: {sorted(lacking)} missing",
            legal="embed_dim, vision_cfg and text_cfg, at the top or under model_cfg",
        )
    folder = config_file.parent
    return Source(config_file.stem, model_cfg, str(weights), values.get("preprocess_cfg", {}), folder)


def _from_open_clip(name: str, pretrained: str) -> Source:
    from open_clip import get_model_config, get_pretrained_cfg

    _check_names(name, pretrained)
    model_cfg = get_model_config(name)
    assert model_cfg is not None  # checked above
    if Path(pretrained).expanduser().is_file():
        return Source(f"{name}/{Path(pretrained).name}", model_cfg, str(Path(pretrained).expanduser()))
    tag = get_pretrained_cfg(name, pretrained)
    if tag.get("quick_gelu"):
        model_cfg["quick_gelu"] = True  # the activation that these weights were trained with
    wanted = f"{name}/{pretrained}"
    if tag.get("hf_hub"):
        repository, _, file = tag["hf_hub"].rpartition("/")
        checkpoint = hub_file(repository, _weight_names(file), wanted=wanted)
    else:
        checkpoint = url_file(tag["url"], wanted=wanted)
    keep = {"mean", "std", "interpolation", "resize_mode"}
    return Source(wanted, model_cfg, checkpoint, {k: v for k, v in tag.items() if k in keep})


def _check_names(name: str, pretrained: str) -> None:
    from open_clip import list_models, list_pretrained_tags_by_model

    models = list_models()
    if name not in models:
        raise ConfigError(
            f"no CLIP named {name!r}",
            legal=f"{_close(name, [*models, OFFLINE])}, hf-hub:<id>, a .json model config, or {OFFLINE}",
        )
    tags = list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained).expanduser().is_file():
        raise ConfigError(
            f"no weights {pretrained!r} for {name}",
            legal=f"{', '.join(tags) or 'no tags for this model'}, or the path of a checkpoint",
        )


def _close(name: str, names: list[str]) -> str:
    """The nearest legal names, without regard to case."""
    by_lower = {known.lower(): known for known in names}
    found = get_close_matches(name.lower(), by_lower, n=4, cutoff=0.4) or ["vit-b-32", "vit-l-14"]
    return ", ".join(by_lower[low] for low in found)


def _weight_names(file: str) -> list[str]:
    """Files that may hold the weights, safetensors first, as open_clip looks for them."""
    from open_clip.constants import HF_WEIGHTS_NAME
    from open_clip.pretrained import _get_safe_alternatives

    file = file or HF_WEIGHTS_NAME
    return [*_get_safe_alternatives(file), file]


def _read_json(file: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a JSON model config: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a {type(values).__name__}", legal="a JSON object")
    return values


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
