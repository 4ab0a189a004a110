"""Config of the inputs (shards, buckets, encoder, dropout), and every variant of a prompt they can draw.

Training draws, for each sample, how many documents stay and which kinds of condition are left out
(`model.training.build.Conditioner`); `variants` names all that can be drawn, so that `vimi-data encode` can
encode them beforehand. Both read the same fields.
"""

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from infra.config import Config, Incidental, Location, NameOrFolder
from model.condition import KINDS
from model.data.buckets import Bucket
from model.prompt.encoder import PromptEncoderConfig
from model.prompt.pictures import ReferenceSize

Side = Annotated[int, Field(ge=4, le=4096)]
SHOWN = frozenset({"subject", "frame"})
"""Condition kinds of the pictures that a task of stage 2 shows beside documents."""


class BucketConfig(Config):
    """A shape of micro-batches."""

    media: Literal["video", "image"] = "video"
    """Which rows it takes."""
    num_frames: int | None = Field(default=None, ge=1, le=4096)
    """Frames; None = the model's for video, 1 for images, which then have a sigma_in of their own. Snap Video
    shows an image as a video of copies: for that, say as many as a video has."""
    height_px: int | None = Field(default=None, ge=4, le=8192)
    """Height in pixels; None = the model's."""
    width_px: int | None = Field(default=None, ge=4, le=8192)
    """Width in pixels; None = the model's."""
    weight: float = Field(default=1.0, ge=0, le=1e6)
    """Share of the micro-batches. Snap Video takes as many videos as images (2048 + 2048 a step)."""


class InputConfig(Config):
    """How rows become tensors: what training and encoding beforehand must agree on."""

    prompts: Incidental[Location]
    """Folder or URI of certified prompt shards."""
    buckets: tuple[BucketConfig, ...] = (BucketConfig(),)
    """Shapes of micro-batches; each micro-batch holds one of them on all workers, so that their work is alike.
    A row goes to the bucket of its medium with the nearest shape, size and length."""
    num_frames: int = Field(default=16, ge=1, le=4096)
    """Frames of a video; 16 (Snap Video, VIMI)."""
    height_px: int = Field(default=36, ge=4, le=8192)
    """Height of the training videos, pixels; 36 (Snap Video's base model)."""
    width_px: int = Field(default=64, ge=4, le=8192)
    """Width of the training videos, pixels; 64 (Snap Video's base model)."""
    fps: float | None = Field(default=None, gt=0, le=1000)
    """Frames a second of the training videos, from each clip's start: a pretrained model knows one rate. A clip
    that is slower keeps its own, one that is too short for `num_frames` is spread, and frames that are stored
    have the rate that augment gave them. None = frames are spread over the whole clip."""
    autoencoder: NameOrFolder | None = None
    """Folder or hub id of an autoencoder of diffusers (or of a pipeline that holds one): the generator works in
    its latents. Channels, the network's size and sigma_in follow; sizes here stay pixels. None = in pixels, as
    Snap Video and VIMI."""
    encoder: PromptEncoderConfig = PromptEncoderConfig()
    """The frozen prompt encoder."""
    references: Literal["faithful", "plus"] = "plus"
    """plus: the generator also sees the prompt's pictures itself, which lose their identity in a frozen encoder
    alone (UniVideo, 2510.08377, table 6), and goes on from a first frame as it is; faithful: it sees them
    through the encoder only, as VIMI's figures show."""
    reference_size_px: tuple[Side, Side] = (224, 224)
    """(height, width) at which it sees them in `plus` mode, whatever the videos' size. 224 (ours) is what most
    encoders see. In latent space they are the autoencoder's latents of pictures of this size."""
    reference_patch_px: int = Field(default=16, ge=1, le=512)
    """Side of a patch of them: 16 as a ViT's (ours), so 14 x 14 tokens a picture; in latent space rounded down
    to whole latents, at least one."""
    documents: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = Field(default=(0, 1, 2), min_length=1)
    """Retrieved documents a sample, drawn uniformly from these numbers; RA-CM3 (2211.12561): 0, 1 or 2."""
    dropout: dict[str, float] = Field(default_factory=lambda: {"all": 0.1})
    """Probability that a sample does without a kind of condition (text, retrieved, subject, frame, or all).
    0.1 of the whole prompt is the classifier-free guidance paper's (2207.12598); VIMI prints none."""

    @field_validator("buckets")
    @classmethod
    def _no_bucket_twice(cls, value: tuple[BucketConfig, ...]) -> tuple[BucketConfig, ...]:
        shapes = [(b.media, b.num_frames, b.height_px, b.width_px) for b in value]
        if not shapes or len(set(shapes)) != len(shapes):
            raise ValueError("legal: at least one, each of another medium, length or size")
        return value

    @field_validator("dropout")
    @classmethod
    def _known_kinds(cls, value: dict[str, float]) -> dict[str, float]:
        legal = (*KINDS, "all")
        for kind, rate in value.items():
            if kind not in legal or not 0 <= rate <= 1:
                raise ValueError(f"{kind}: {rate}; legal: {', '.join(legal)}, each in [0, 1]")
        return value

    @model_validator(mode="after")
    def _references_divide(self) -> "InputConfig":
        side = self.reference_patch_px
        if self.references == "plus" and any(size % side for size in self.reference_size_px):
            sizes = list(self.reference_size_px)
            raise ValueError(f"reference_size_px {sizes} in patches of {side}; legal: multiples of {side}")
        return self

    @property
    def reference_size(self) -> ReferenceSize:
        """At what size the generator sees pictures itself, in pixels."""
        return ReferenceSize(*self.reference_size_px, aspect=self.width_px / self.height_px)

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The buckets with their numbers filled in."""
        return tuple(
            Bucket(
                b.media,
                b.num_frames or (1 if b.media == "image" else self.num_frames),
                b.height_px or self.height_px,
                b.width_px or self.width_px,
                self.fps if b.media == "video" else None,
            )
            for b in self.buckets
        )


Variant = tuple[int | None, frozenset[str]]
"""(number of documents, dropped kinds) as `model.prompt.select` takes them."""


def dropped_sets(rates: dict[str, float]) -> list[frozenset[str]]:
    """Every set of kinds that can be drawn with these rates (`model.step.draw_dropped`), smallest first."""
    choices = [[False] if not rates.get(k) else [True] if rates[k] >= 1 else [False, True] for k in KINDS]
    found = {frozenset(k for k, out in zip(KINDS, gone, strict=True) if out) for gone in product(*choices)}
    whole = frozenset(KINDS)
    if rates.get("all", 0.0) >= 1:
        found = {whole}
    elif rates.get("all"):
        found.add(whole)
    return sorted(found, key=lambda kinds: (len(kinds), sorted(kinds)))


def variants(documents: Sequence[int], dropout: dict[str, float]) -> list[Variant]:
    """All that training can draw of a prompt, and what validation looks at: most documents, none, nothing."""
    drawn = [(number, kinds) for kinds in dropped_sets(dropout) for number in sorted(documents)]
    looked_at: list[Variant] = [(max(documents), frozenset()), (0, frozenset()), (0, SHOWN)]
    return list(dict.fromkeys([*drawn, *looked_at]))
