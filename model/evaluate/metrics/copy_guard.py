"""Copy-paste guard: likeness to the reference pictures less likeness to the words; copied references are seen.

A generator that shows its reference and does not do what the prompt says has a high CLIP-I and a low CLIP-T:
the difference tells it from one that does both.
"""

from model.evaluate.metric import Features, MeanMetric
from model.evaluate.metrics.clip_i import reference_similarity
from model.evaluate.metrics.clip_t import text_similarity


class CopyGuard(MeanMetric):
    name, better = "copy_guard", "lower"
    needs = ("clip", "clip_text", "clip_references")
    needs_text = needs_references = True

    def value(self, video: Features, prompt: Features) -> float | None:
        if "clip_text" not in prompt or "clip_references" not in prompt:
            return None
        return reference_similarity(video, prompt) - text_similarity(video, prompt)
