"""Temporal consistency: cosine of the CLIP vectors of neighbouring frames, mean over a video."""

from model.evaluate.metric import Features, MeanMetric, unit


class Consistency(MeanMetric):
    name, needs, better = "consistency", ("clip",), "higher"

    def value(self, video: Features, prompt: Features) -> float | None:
        frames = unit(video["clip"])
        return float((frames[1:] * frames[:-1]).sum(1).mean()) if len(frames) > 1 else None
