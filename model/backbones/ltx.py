"""LTX-Video: packed latents, a masked text, places in seconds and pixels, times that shift with the size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.backbones.family import Family, Scale, Sizes
from model.flow import TRAIN_STEPS, Flow, shifted

OWN_TEXT_TOKENS = 128
"""To which its pipeline pads a caption: its encoder reads the padding too, so that states hang on it."""
PIPELINES = ("LTXPipeline", "LTXImageToVideoPipeline")
"""Of models that are called as this file calls them."""


@dataclass(frozen=True)
class LtxFlow(Flow):
    """Flow matching sampled at the times of LTX's pipeline.

    Attributes:
        last: time at which the last step begins, to which the others are stretched; None = as they are.
    """

    last: float | None = None

    def sampling_sigmas(self, num_steps: int) -> Tensor:
        """As `Flow.sampling_sigmas`, of times from 1 to 1 / num_steps."""
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, at least 1 is needed")
        times = shifted(torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64), self.shift)
        if self.last is not None and num_steps > 1:
            times = 1 - (1 - times) * (1 - self.last) / (1 - times[-1])
        return torch.cat([times, torch.zeros(1)])


class Ltx(Family):
    """One token a latent."""

    transformer = "LTXVideoTransformer3DModel"
    pipeline = "LTXPipeline"
    text_tokens = 256
    blocks = "transformer_blocks"
    has_text_mask = True
    fps = 25.0

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        side, thickness = config["patch_size"], config["patch_size_t"]
        patch = (thickness, side, side)
        return Sizes(config["in_channels"], config["caption_channels"], patch, config["num_layers"])

    def refuse(self, config: Mapping[str, Any], index: Mapping[str, Any]) -> str | None:
        made_by = index.get("_class_name")
        if made_by not in (None, *PIPELINES):
            return f"of a {made_by}, which tells times and places otherwise (LTX-Video 0.9.5 and later)"
        if not config["patch_size"] == config["patch_size_t"] == 1:
            return "packed in patches of several latents"
        return None

    def objective(self, scheduler: Mapping[str, Any], num_tokens: int) -> LtxFlow:
        """The scheduler's dynamic shift, e^mu with mu linear in the number of tokens."""
        last = scheduler.get("shift_terminal")
        if not scheduler.get("use_dynamic_shifting"):
            return LtxFlow(shift=scheduler.get("shift") or 1.0, last=last)
        few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        shift = math.exp(low + (high - low) * (num_tokens - few) / (many - few))
        return LtxFlow(shift=shift, last=last)

    def encode_texts(self, pipeline: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
        states, mask, _, _ = pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=OWN_TEXT_TOKENS
        )
        return states, mask.bool()

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
        b, t, c, h, w = x.shape
        if times.ndim == 2:
            times = times.repeat_interleave(h * w, dim=1)
        rate = torch.where(fps.isfinite(), fps, self.fps).view(-1, 1, 1, 1, 1)  # pictures have none
        answer = transformer(
            x.permute(0, 1, 3, 4, 2).reshape(b, t * h * w, c),
            text,
            TRAIN_STEPS * times,
            text_mask,
            num_frames=t,
            height=h,
            width=w,
            rope_interpolation_scale=(scale.frames / rate, scale.px, scale.px),
            return_dict=False,
        )[0]
        return answer.view(b, t, h, w, -1).permute(0, 1, 4, 2, 3)
