"""Temporal flicker: 1 - mean absolute difference of neighbouring frames, as a share of the pixels' range.

VBench's (255 - MAE) / 255. A still video has the best score there is: read it beside `frozen` and `dynamics`.
"""

from model.evaluate.metric import Features, MeanMetric


class Flicker(MeanMetric):
    name, needs, better = "flicker", ("motion",), "higher"

    def value(self, video: Features, prompt: Features) -> float | None:
        return 1.0 - float(video["motion"].mean(dtype="float64")) if len(video["motion"]) else None
