"""Class tokens of a DINO ViT, of frames and of pictures."""

from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from model.evaluate.network import (
    Network,
    NetworkConfig,
    exactly,
    find_pretrained,
    load_pretrained,
    pretrained_identity,
)


class DinoNetwork(Network):
    """Class tokens of a DINO ViT, `t d`."""

    name = "dino"

    @classmethod
    def find(cls, config: NetworkConfig) -> str:
        return find_pretrained(config.dino, "DINO", field="dino")

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModel

        self.find(self.config)
        return load_pretrained(
            self.config.dino,
            "DINO",
            processor=AutoImageProcessor,
            model=AutoModel,
            device=self.device,
            use_fast=False,
        )

    @property
    def identity(self) -> dict[str, Any]:
        processor, model = self.parts
        how = {key: value for key, value in processor.to_dict().items() if key != "_processor_class"}
        return {**pretrained_identity(self.config.dino, model), "preprocessing": how}

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        processor, model = self.parts
        pixels = processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
        with exactly():
            return model(**pixels.to(self.device)).last_hidden_state[:, 0].float().cpu().numpy()
