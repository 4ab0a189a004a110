"""Subject similarity as MSRVTT-Personalization has it (Video Alchemist, 2501.06187); a missing one is 0.

Cosine of the DINO tokens of each subject found in a frame and of its reference picture, mean over frames and
references. The benchmark's own code drops the last videos where workers don't divide them; here none is.
"""

from model.evaluate.metric import Features, MeanMetric, unit


class Subject(MeanMetric):
    name, needs, better, needs_references = "subject", ("subject", "subject_references"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        if "subject" not in video or "subject_references" not in prompt:
            return None
        return float((unit(video["subject"]) * unit(prompt["subject_references"])).sum(-1).mean())
