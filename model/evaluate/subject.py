"""DINO's look at frames, and at a prompt's subjects alone, found in them as MSRVTT-Personalization does.

word ─ GroundingDINO ─▶ best box above .4 ─ SAM ─▶ best mask above .9 ─▶ the subject alone, on white,
padded to a square, 224 pixels ─ DINO ─▶ class token; zeros where it was not found
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from infra.pretrained import exactly, find_pretrained, load_pretrained
from model.evaluate.network import Network, NetworkConfig, pretrained_identity

if TYPE_CHECKING:
    from infra.grounding import Detector, Segmenter

MIN_BOX, MIN_TEXT, MIN_MASK = 0.4, 0.25, 0.9
"""Scores of the protocol; that of the text is GroundingDINO's own default, and decides no box."""
SIDE_PX = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Box = tuple[float, float, float, float]


class DinoNetwork(Network):
    """Class tokens of a DINO ViT, `t d`."""

    name = "dino"

    @classmethod
    def find(cls, config: NetworkConfig) -> str:
        return find_pretrained(config.dino, "DINO", field="networks.dino")

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


class SubjectNetwork(Network):
    """Class tokens of the subjects in each frame, `t r d`: one for each reference picture."""

    name = "subject"
    reads_words = True

    def __init__(self, config: NetworkConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.dino = DinoNetwork(config, device)

    @classmethod
    def find(cls, config: NetworkConfig) -> str:
        detector = find_pretrained(config.detector, "GroundingDINO", field="networks.detector")
        segmenter = find_pretrained(config.segmenter, "SAM", field="networks.segmenter")
        return f"{detector}, {segmenter}, {DinoNetwork.find(config)}"

    @cached_property
    def detector(self) -> "Detector":
        from infra.grounding import Detector

        return Detector(self.config.detector, self.device, field="networks.detector")

    @cached_property
    def segmenter(self) -> "Segmenter":
        from infra.grounding import Segmenter

        return Segmenter(self.config.segmenter, self.device, field="networks.segmenter")

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "name": "MSRVTT-Personalization's subjects",
            "detector": pretrained_identity(self.config.detector, self.detector.model),
            "segmenter": pretrained_identity(self.config.segmenter, self.segmenter.model),
            "dino": self.dino.identity,
            "least": {"box": MIN_BOX, "text": MIN_TEXT, "mask": MIN_MASK},
            "crop": f"on white, square, {SIDE_PX} bicubic",
        }

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Class tokens of pictures that show their subject alone: references."""
        return np.stack([self._token(Image.fromarray(frame)) for frame in frames])

    def about(self, frames: np.ndarray, words: Sequence[str]) -> np.ndarray:
        found = {word: [self._subject(frame, word) for frame in frames] for word in dict.fromkeys(words)}
        return np.stack([np.stack(found[word]) for word in words], 1)

    def _subject(self, frame: np.ndarray, word: str) -> np.ndarray:
        """Class token `d` of what the word names; zeros where it is not found."""
        picture = Image.fromarray(frame)
        box = self.box(picture, word)
        mask = None if box is None else self.mask(picture, box)
        if box is None or mask is None or not mask.any():
            return np.zeros(self.dino.parts[1].config.hidden_size, np.float32)
        return self._token(alone(frame, mask, box))

    def box(self, picture: Image.Image, word: str) -> Box | None:
        """The best box of what the word names: left, top, right, bottom; None where there is none."""
        found = self.detector.find([picture], [word], min_score=MIN_BOX)[0]
        return tuple(found.boxes[0].tolist()) if len(found.scores) else None

    def mask(self, picture: Image.Image, box: Box) -> np.ndarray | None:
        """The best mask of what is in the box, bool `h w`; None where SAM is not sure."""
        masks, scores = self.segmenter.masks(picture, np.array([box], np.float32))
        return masks[0] if scores[0] >= MIN_MASK else None

    def _token(self, picture: Image.Image) -> np.ndarray:
        small = square(picture).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        pixels = (np.asarray(small, np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None]).to(self.device)
        with exactly():
            out = self.dino.parts[1](pixel_values=batch, interpolate_pos_encoding=True)
        return out.last_hidden_state[0, 0].float().cpu().numpy()


def alone(frame: np.ndarray, mask: np.ndarray, box: Box) -> Image.Image:
    """The part of a frame in the box, white where the mask is not."""
    left, top = (max(0, int(edge)) for edge in box[:2])
    right, bottom = max(left + 1, round(box[2])), max(top + 1, round(box[3]))
    shown = np.where(mask[..., None], frame, 255).astype(np.uint8)
    return Image.fromarray(shown[top:bottom, left:right])


def square(picture: Image.Image) -> Image.Image:
    """The picture in the middle of a white square."""
    side = max(picture.size)
    whole = Image.new("RGB", (side, side), "white")
    whole.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return whole
