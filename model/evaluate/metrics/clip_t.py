"""CLIP-T (CLIPSIM, Text-S): cosine of each frame's and the prompt's CLIP vectors, mean over the frames."""

from model.evaluate.metric import Features, MeanMetric, unit


class ClipT(MeanMetric):
    name, needs, better, needs_text = "clip_t", ("clip", "clip_text"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        return text_similarity(video, prompt) if "clip_text" in prompt else None


def text_similarity(video: Features, prompt: Features) -> float:
    return float((unit(video["clip"]) @ unit(prompt["clip_text"])).mean())
