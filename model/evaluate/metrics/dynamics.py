"""Dynamics without weights: mean absolute difference of neighbouring frames, as a share of the range."""

from model.evaluate.metric import Features, MeanMetric


class Dynamics(MeanMetric):
    name, needs, better = "dynamics", ("motion",), "neither"

    def value(self, video: Features, prompt: Features) -> float | None:
        return float(video["motion"].mean(dtype="float64")) if len(video["motion"]) else None
