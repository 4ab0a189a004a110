"""Wan 2.1 and 2.2: text to video by one transformer (1.3B, 14B, and 5B behind the larger autoencoder)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.backbones.family import Family, Scale, Sizes
from model.flow import TRAIN_STEPS, Flow

SHIFT = 3.0
"""Of the times, where the scheduler's config is silent: Wan's own for 480p; 5 for 720p."""
LARGE_CHANNELS = 48
"""Of the latents of Wan 2.2's 5B, which is made for other videos than the pipeline that it shares."""
LARGE = {"num_frames": 121, "size_px": (704, 1280), "fps": 24.0}
"""What it is made for, as its model card says."""


class Wan(Family):
    """Full attention over all patches of all frames; texts without a mask, padded with zeros to 512."""

    transformer = "WanTransformer3DModel"
    pipeline = "WanPipeline"
    text_tokens = 512
    fps = 16.0

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        return Sizes(
            config["in_channels"], config["text_dim"], tuple(config["patch_size"]), config["num_layers"]
        )

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        made = super().defaults(config)
        return made | LARGE if config["in_channels"] == LARGE_CHANNELS else made

    def refuse(self, config: Mapping[str, Any], index: Mapping[str, Any]) -> str | None:
        if config.get("image_dim") or config["in_channels"] != (
            config["out_channels"] or config["in_channels"]
        ):
            return "an image-to-video model, whose input carries a picture beside the noise"
        if index.get("boundary_ratio") is not None or any(index.get("transformer_2") or ()):
            return "two experts, one for each half of the noise levels"
        if self.sizes(config).patch[0] != 1:
            return "in patches of several latent frames, of which none can be clean alone"
        return None

    def objective(self, scheduler: Mapping[str, Any], num_tokens: int) -> Flow:
        del num_tokens  # the same at all sizes
        return Flow(shift=scheduler.get("flow_shift") or scheduler.get("shift") or SHIFT)

    def encode_texts(self, pipeline: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
        states, _ = pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return states, states.any(dim=-1)  # the padding is zero

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
        """One time a video, or where frames are clean one a token, as Wan 2.2's 5B does image to video."""
        del text_mask, fps, scale
        if times.ndim == 2:
            _, rows, columns = self.sizes(transformer.config).patch
            times = times.repeat_interleave((x.shape[-2] // rows) * (x.shape[-1] // columns), dim=1)
        answer = transformer(x.transpose(1, 2), TRAIN_STEPS * times, text, return_dict=False)[0]
        return answer.transpose(1, 2)
