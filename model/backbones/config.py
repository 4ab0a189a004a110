"""Config of a pretrained backbone: a model in diffusers' format, its adapters, and who reads the text."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from infra.config import UNION_TAG, Config, NameOrFolder
from infra.errors import ConfigError


class LoraConfig(Config):
    """Low-rank adapters (LoRA, 2106.09685) of the base's linear layers, by peft."""

    rank: int = Field(default=32, ge=1, le=4096)
    """Of each adapter. 32 (ours) is what recipes for Wan take most."""
    alpha: float | None = Field(default=None, gt=0, le=65536)
    """The adapter's answer counts alpha / rank; null = the rank, so 1."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get one; empty = those of all attentions."""


class DiffusersConfig(Config):
    """A pretrained video transformer of diffusers in place of a preset."""

    kind: Literal["diffusers"]
    """Says that the backbone is one."""
    model: NameOrFolder
    """Folder or hub id of a pipeline of diffusers: transformer, scheduler, vae, and for `append` and `native`
    text_encoder and tokenizer. Families: `model.backbones.families`."""
    lora: LoraConfig | None = LoraConfig()
    """Adapters to train while the base stays as it is; null = train all of it."""
    text: Literal["replace", "append", "native"] = "append"
    """append: the model's own text encoder reads the caption, and our prompt encoder's tokens stand behind its
    states, at first with weight 0, so that step 0 is the base model to the bit. replace: ours alone. native:
    the model's own alone, so that the result needs nothing of ours."""

    @property
    def reads_captions(self) -> bool:
        """The model's own text encoder is needed."""
        return self.text != "replace"


def _kind(value: Any) -> str:
    named = isinstance(value, DiffusersConfig) or (isinstance(value, Mapping) and "kind" in value)
    return f"{UNION_TAG}diffusers" if named else f"{UNION_TAG}preset"


BackboneFields = Annotated[
    Annotated[dict[str, Any], Tag(f"{UNION_TAG}preset")]
    | Annotated[DiffusersConfig, Tag(f"{UNION_TAG}diffusers")],
    Discriminator(_kind),
]


def with_base(values: Any) -> Any:
    """A stage's values with what follows from a pretrained backbone: its autoencoder, its text encoder, and
    references of the videos' size, since they are frames.

    Raises:
        ConfigError: references of another size are asked for.
    """
    backbone = values.get("backbone") if isinstance(values, Mapping) else None
    if isinstance(backbone, DiffusersConfig):
        backbone = backbone.model_dump()
    if not isinstance(backbone, Mapping) or not isinstance(backbone.get("model"), str):
        return values
    model, text = backbone["model"], backbone.get("text", DiffusersConfig.model_fields["text"].default)
    encoder = values.get("encoder")
    if text != "replace" and (encoder is None or isinstance(encoder, Mapping)):
        encoder = {**(encoder or {}), "captions": model, "captions_alone": text == "native"}
    followed = {"autoencoder": values.get("autoencoder") or model, "encoder": encoder}
    if values.get("height_px") and values.get("width_px"):
        size = (values["height_px"], values["width_px"])
        asked = values.get("reference_size_px")
        if asked is not None and (not isinstance(asked, list | tuple) or tuple(asked) != size):
            raise ConfigError(
                f"reference_size_px {asked} with backbone.kind diffusers, where a reference is a frame",
                legal=f"{list(size)}, the size of the videos, or leave it out",
            )
        followed["reference_size_px"] = size
        followed["reference_patch_px"] = 1
    return {**values, **{name: value for name, value in followed.items() if value is not None}}
