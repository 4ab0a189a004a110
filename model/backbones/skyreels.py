"""SkyReels-V2, text to video and diffusion forcing: Wan with a time for each frame and a frame rate."""

from typing import Any

import torch
from torch import Tensor

from model.backbones.family import Scale
from model.backbones.wan import Wan
from model.flow import TRAIN_STEPS

SLOW_FPS = 16
"""Of the two frame rates that some of these models are told, the one with number 0; the other is 24."""


class SkyReels(Wan):
    """Where frames are clean it is called as its diffusion forcing calls it."""

    transformer = "SkyReelsV2Transformer3DModel"
    pipeline = "SkyReelsV2Pipeline"
    fps = 24.0

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
        rates = None
        if transformer.config.inject_sample_info:
            if times.ndim == 2 and len(x) > 1:  # diffusers adds the rates to the times of one video alone
                rows = [slice(n, n + 1) for n in range(len(x))]
                each = [(x[n], times[n], text[n], text_mask[n], fps[n]) for n in rows]
                answers = [
                    self.velocity(transformer, *tensors, fps=rate, scale=scale) for *tensors, rate in each
                ]
                return torch.cat(answers)
            rates = [0 if round(rate) == SLOW_FPS else 1 for rate in fps.nan_to_num(posinf=24).tolist()]
        answer = transformer(
            x.transpose(1, 2),
            TRAIN_STEPS * times,
            text,
            enable_diffusion_forcing=times.ndim == 2,
            fps=rates,
            return_dict=False,
        )[0]
        return answer.transpose(1, 2)
