"""CLIP-I: cosine of each frame's and each reference picture's CLIP vectors, mean over both.

A video that copies its reference wins this: read it beside `clip_t` and `copy_guard`.
"""

from model.evaluate.metric import Features, MeanMetric, unit


class ClipI(MeanMetric):
    name, needs, better, needs_references = "clip_i", ("clip", "clip_references"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        return reference_similarity(video, prompt) if "clip_references" in prompt else None


def reference_similarity(video: Features, prompt: Features) -> float:
    return float((unit(video["clip"]) @ unit(prompt["clip_references"]).T).mean())
