"""Families of diffusers' video transformers: what each of them wants, behind one protocol.

    latents, a time for each frame, text -> velocity

A clean frame is one whose time is 0: the first frame of the video to be made, or a reference behind its last.
A family is one file with one subclass, and its line in `model.backbones.families`. It says how the transformer
is called; loading, LoRA, text, references, checkpoints, cost and export are the same for all
(`model.backbones.pretrained`).
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from model.objective import Objective


@dataclass(frozen=True)
class Sizes:
    """What a transformer's config says of its tensors.

    Attributes:
        channels: of the latents, in and out.
        text_dim: width of the text states that it reads.
        patch: (t, h, w) latents along the sides of a token.
        depth: blocks.
    """

    channels: int
    text_dim: int
    patch: tuple[int, int, int]
    depth: int


@dataclass(frozen=True)
class Scale:
    """What a latent stands for: pixels along its sides, frames (after the first)."""

    px: int = 8
    frames: int = 4


class Family(ABC):
    """One kind of transformer."""

    transformer: ClassVar[str]
    """Its class in diffusers."""
    pipeline: ClassVar[str]
    """The stock pipeline from text to video: reads texts, and loads what is exported."""
    text_tokens: ClassVar[int]
    """Length that every text is padded to, as the pipeline does; a sample must not depend on its company."""
    blocks: ClassVar[str] = "blocks"
    """Its list of blocks: the units of sharding, recomputation and compilation."""
    has_text_mask: ClassVar[bool] = False
    """Padding is hidden; else it is part of what the model was trained on, and reads as zeros."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers that get an adapter, by the ends of their names: the attentions'."""
    fps: ClassVar[float] = 24.0
    """Frames a second of what it makes."""

    @abstractmethod
    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Read the transformer's config.json."""

    @abstractmethod
    def objective(self, scheduler: Mapping[str, Any], num_tokens: int) -> Objective:
        """The process that it was trained for: `scheduler` is the folder's scheduler_config.json."""

    @abstractmethod
    def velocity(
        self,
        transformer: Any,
        x: Tensor,
        times: Tensor,
        text: Tensor,
        text_mask: Tensor,
        *,
        fps: Tensor,
        scale: Scale,
    ) -> Tensor:
        """The answer for latents `b t c h w` at times `b` in [0, 1], or `b t` where frames are clean (0).

        `text` is `b text_tokens text_dim`, `text_mask` the same in bool, `fps` `b` frames a second of the
        video, inf for pictures.
        """

    @abstractmethod
    def encode_texts(self, pipeline: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
        """States `b l text_dim` of texts by the stock pipeline, and their `b l` mask."""

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the stock pipeline makes unless told otherwise: fields of `vimi-train sample`."""
        del config
        pipeline = getattr(importlib.import_module("diffusers"), self.pipeline)
        says = {name: p.default for name, p in inspect.signature(pipeline.__call__).parameters.items()}
        return {
            "num_frames": says["num_frames"],
            "size_px": (says["height"], says["width"]),
            "num_steps": says["num_inference_steps"],
            "guidance": {"weight": says["guidance_scale"]},
            "fps": self.fps,
        }

    def refuse(self, config: Mapping[str, Any], index: Mapping[str, Any]) -> str | None:
        """Why a model of this class can't be trained here; `index` is the folder's model_index.json."""
        del config, index
        return None
