"""DINO-I: cosine of each frame's and each reference picture's DINO vectors, mean over both (DreamBooth)."""

from model.evaluate.metric import Features, MeanMetric, unit


class DinoI(MeanMetric):
    name, needs, better, needs_references = "dino_i", ("dino", "dino_references"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        if "dino_references" not in prompt:
            return None
        return float((unit(video["dino"]) @ unit(prompt["dino_references"]).T).mean())
