"""Frozen share: how many of the videos are stills, no two neighbouring frames of which differ."""

from model.evaluate.metric import Features, MeanMetric

STILL = 0.5 / 255
"""Mean difference below which two frames are the same picture: half a grey level. Ours; x264 at crf 12 stays
below it on a still."""


class Frozen(MeanMetric):
    name, needs, better = "frozen", ("motion",), "lower"

    def value(self, video: Features, prompt: Features) -> float | None:
        return float(video["motion"].max() < STILL) if len(video["motion"]) else None
