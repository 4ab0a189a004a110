"""Grounds phrases in pictures: any zero-shot detector and any mask generator of transformers.

phrase ─ GroundingDINO, MM-GroundingDINO, OWLv2, OmDet-Turbo ─▶ boxes ─ SAM, SAM 2, SAM-HQ, EdgeTAM ─▶ masks
phrase ─ SAM 3 ──────────────────────────────────────────────────────────────────────────────────────▶ both
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForMaskGeneration,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    Sam2Processor,
    Sam3Model,
    Sam3Processor,
    Sam3TrackerProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASK_GENERATION_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
)

from infra.errors import ConfigError
from infra.pretrained import exactly, load_pretrained, read_model_type

DETECTORS = tuple(MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES)
SEGMENTERS = tuple(MODEL_FOR_MASK_GENERATION_MAPPING_NAMES)
TEXT_TO_MASKS = ("sam3", "sam3_video")
"""Families that need no segmenter, and have no Auto class; published SAM 3 says that it is its video model."""
PICTURE_PROCESSORS = {
    "sam2_video": Sam2Processor,
    "edgetam_video": Sam2Processor,
    "sam3_video": Sam3TrackerProcessor,
}
"""Published SAM 2, EdgeTAM and SAM 3 name the processors of their video models; those of pictures are these."""
OWL_TEMPLATE = "a photo of a {}"
"""Minderer et al. 2022 (OWL-ViT), as CLIP was evaluated; the others were trained on bare phrases."""


@dataclass(frozen=True)
class Boxes:
    """What a detector finds of one phrase in one picture, surest first."""

    boxes: np.ndarray
    """float32 `n 4`: left, top, right, bottom in pixels of the picture; some reach over its edge."""
    scores: np.ndarray
    """float32 `n`, 0..1."""
    masks: np.ndarray | None = None
    """bool `n h w`, of a model that gives both."""


def check_detector(place: str, *, field: str) -> bool:
    """Refuse what is no detector by words, without loading it; True = it gives masks itself.

    Raises:
        ConfigError: not there, or of another family.
    """
    family = read_model_type(place, "detector", field=field)
    if family not in (*DETECTORS, *TEXT_TO_MASKS):
        raise ConfigError(
            f"{field} = {place} is a {family}", legal=f"a model of {', '.join((*DETECTORS, *TEXT_TO_MASKS))}"
        )
    return family in TEXT_TO_MASKS


def check_segmenter(place: str, *, field: str) -> str:
    """The family of a segmenter; refuses what makes no masks of boxes, without loading it.

    Raises:
        ConfigError: not there, or of another family.
    """
    family = read_model_type(place, "segmenter", field=field)
    if family not in SEGMENTERS:
        raise ConfigError(f"{field} = {place} is a {family}", legal=f"a model of {', '.join(SEGMENTERS)}")
    return family


class Detector:
    """A zero-shot detector: words to boxes, and for some families to masks."""

    def __init__(self, place: str, device: str | torch.device = "cpu", *, field: str = "detector") -> None:
        self.gives_masks, self.device = check_detector(place, field=field), torch.device(device)
        self.processor, self.model = load_pretrained(
            place,
            "detector",
            processor=Sam3Processor if self.gives_masks else AutoProcessor,
            model=Sam3Model if self.gives_masks else AutoModelForZeroShotObjectDetection,
            device=device,
        )
        self.template = OWL_TEMPLATE if self.model.config.model_type.startswith("owl") else "{}"

    def find(
        self,
        pictures: Sequence[Image.Image],
        phrases: Sequence[str],
        *,
        min_score: float,
        batch_size: int = 16,
    ) -> list[Boxes]:
        """What each picture shows of the phrase at the same place; pictures are of one size."""
        found: list[Boxes] = []
        for start in range(0, len(pictures), batch_size):
            rows = slice(start, start + batch_size)
            found += self._batch(list(pictures[rows]), list(phrases[rows]), min_score)
        return found

    def _batch(self, pictures: list[Image.Image], phrases: list[str], min_score: float) -> list[Boxes]:
        words = [self.template.format(phrase.lower().strip()) for phrase in phrases]
        sizes = [picture.size[::-1] for picture in pictures]
        text: Any = words if self.gives_masks else [[word] for word in words]
        inputs = self.processor(images=pictures, text=text, return_tensors="pt", **self._lengths()).to(
            self.device
        )
        with exactly():
            outputs = self.model(**inputs)
            if self.gives_masks:
                found = self.processor.post_process_instance_segmentation(
                    outputs, threshold=min_score, target_sizes=sizes
                )
            else:
                found = self.processor.post_process_grounded_object_detection(
                    outputs, threshold=min_score, target_sizes=sizes
                )
        return [_sorted(one) for one in found]

    def _lengths(self) -> dict[str, Any]:
        """Phrases of a batch are padded to one length, and cut where a family's text tower ends."""
        if self.gives_masks:  # its processor does so itself
            return {}
        return {"truncation": True, "padding": "max_length" if self.template == OWL_TEMPLATE else True}


def _sorted(found: dict[str, Any]) -> Boxes:
    scores, order = found["scores"].float().sort(descending=True, stable=True)
    masks = found.get("masks")
    return Boxes(
        found["boxes"].float()[order].cpu().numpy(),
        scores.cpu().numpy(),
        None if masks is None else masks[order].bool().cpu().numpy(),
    )


class Segmenter:
    """A mask generator: boxes to masks."""

    def __init__(self, place: str, device: str | torch.device = "cpu", *, field: str = "segmenter") -> None:
        processor = PICTURE_PROCESSORS.get(check_segmenter(place, field=field), AutoProcessor)
        self.device = torch.device(device)
        self.processor, self.model = load_pretrained(
            place, "segmenter", processor=processor, model=AutoModelForMaskGeneration, device=device
        )

    def masks(self, picture: Image.Image, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best mask of what is in each box `n 4`: bool `n h w`, and how sure it is, float32 `n`."""
        inputs = self.processor(picture, input_boxes=[boxes.tolist()], return_tensors="pt").to(self.device)
        with exactly():
            outputs = self.model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"])
        sizes = [inputs[name].cpu() for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
        scores, best = outputs.iou_scores[0].float().cpu().max(-1)
        whole = self.processor.image_processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)[0]
        rows = torch.arange(len(best))
        return whole[rows, best].numpy().astype(bool), scores.numpy()
