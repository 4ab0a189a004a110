"""Face similarity: cosine of ArcFace's vectors of each frame's face and the reference's; no face counts 0."""

import numpy as np

from model.evaluate.metric import Features, MeanMetric, unit


class Face(MeanMetric):
    name, needs, better, needs_references = "face", ("face", "face_references"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        if "face_references" not in prompt:
            return None
        if not np.any(video["face"]):
            return 0.0
        return float((unit(video["face"]) @ unit(prompt["face_references"]).T).mean())
