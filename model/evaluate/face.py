"""The best face of each frame, seen by ArcFace, as MSRVTT-Personalization looks at faces."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.pretrained import exactly
from model.evaluate.network import Network, NetworkConfig, find_file, load_script
from model.evaluate.weights import file_sha256

DETECTOR = "a face detector as TorchScript, such as a YOLO of faces with its boxes decoded"
ARCFACE = "an ArcFace as TorchScript, such as insightface's R100"
MIN_SCORE = 0.5
"""Of a face's box (ours; the protocol takes its detector's first)."""
SIDE_PX = 112


class FaceNetwork(Network):
    """Vectors of the best face in each frame, `t d`; zeros where there is none."""

    name = "face"

    @classmethod
    def find(cls, config: NetworkConfig) -> str:
        places = (
            find_file(config, "face_detector", "face detector", DETECTOR),
            find_file(config, "face", "ArcFace", ARCFACE),
        )
        return " and ".join(f"{Path(place).name} (sha256 {file_sha256(place)[:12]}...)" for place in places)

    @cached_property
    def detector(self) -> Any:
        place = find_file(self.config, "face_detector", "face detector", DETECTOR)
        return load_script(place, self.device, DETECTOR)

    @cached_property
    def arcface(self) -> Any:
        return load_script(find_file(self.config, "face", "ArcFace", ARCFACE), self.device, ARCFACE)

    @property
    def identity(self) -> dict[str, Any]:
        self.find(self.config)
        places = {"detector": self.config.face_detector, "arcface": self.config.face}
        hashes = {name: file_sha256(place) for name, place in places.items() if place}
        return {
            "name": "face",
            **hashes,
            "least": MIN_SCORE,
            "crop": f"box, {SIDE_PX} bilinear",
            "range": [-1, 1],
        }

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        return self._vectors([self._face(frame) for frame in frames])

    def pictures(self, pictures: Any) -> np.ndarray:
        """Of references: their best face, or the whole picture, which may be the crop of one."""
        frames = [np.asarray(picture.convert("RGB")) for picture in pictures]
        found = [self._face(frame) for frame in frames]
        return self._vectors(
            [frame if face is None else face for frame, face in zip(frames, found, strict=True)]
        )

    def _face(self, frame: np.ndarray) -> np.ndarray | None:
        """The part of the frame in the best box, uint8 `h w 3`; None where there is none."""
        pixels = torch.from_numpy(frame.copy()).to(self.device).permute(2, 0, 1)[None].float()
        with exactly():
            boxes: Tensor = self.detector(pixels)
        if not len(boxes) or float(boxes[:, 4].max()) < MIN_SCORE:
            return None
        left, top, right, bottom = boxes[int(boxes[:, 4].argmax()), :4].round().int().tolist()
        part = frame[max(0, top) : max(0, bottom), max(0, left) : max(0, right)]
        return part if part.size else None

    def _vectors(self, faces: list[np.ndarray | None]) -> np.ndarray:
        found = [None if face is None else self._vector(face) for face in faces]
        width = next((len(vector) for vector in found if vector is not None), 1)
        return np.stack([np.zeros(width, np.float32) if vector is None else vector for vector in found])

    def _vector(self, face: np.ndarray) -> np.ndarray:
        small = Image.fromarray(face).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(small, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)
        with exactly():
            return self.arcface(pixels.to(self.device))[0].float().cpu().numpy()
