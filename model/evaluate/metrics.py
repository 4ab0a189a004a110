"""All metrics by name; a new one is a class here and its place in `METRICS`."""

import numpy as np

from model.evaluate.distributions import FrechetMetric, InceptionScore, KernelMetric
from model.evaluate.metric import Features, MeanMetric, Metric, unit

FLOW_PX, PER_PX, MOVING_FRAC = 6.0, 256.0, 0.25
"""Of dynamic degree: the flow that counts as movement, for each so many pixels, in this share of the pairs."""
STILL = 0.5 / 255
"""Mean difference below which two frames are the same picture: half a grey level. Ours; x264 at crf 12 stays
below it on a still."""


class Fvd(FrechetMetric):
    """FVD: Fréchet distance between I3D's logits of real and sampled videos (Unterthiner, 1812.01717)."""

    name, needs = "fvd", ("i3d",)


class Kvd(KernelMetric):
    """KVD: kernel distance between I3D's logits of real and sampled videos (Unterthiner, 1812.01717)."""

    name, needs = "kvd", ("i3d",)


class Fid(FrechetMetric):
    """FID: Fréchet distance between Inception's features of all frames of real and sampled videos."""

    name, needs = "fid", ("inception",)


class ClipFid(FrechetMetric):
    """CLIP-FID: Fréchet distance between CLIP's vectors of all frames, as MSR-VTT's protocol has it."""

    name, needs = "clip_fid", ("clip",)


class Kid(KernelMetric):
    """KID: kernel distance between Inception's features of the middle frames of real and sampled videos."""

    name, needs = "kid", ("inception",)


class Is(InceptionScore):
    """Inception score by a C3D of UCF101, as papers have it."""

    name, needs = "is", ("c3d",)


class IsI3d(InceptionScore):
    """Inception score by I3D's classes: another metric, since one network's says nothing beside another's."""

    name, needs = "is_i3d", ("i3d",)


class ClipT(MeanMetric):
    """CLIP-T (CLIPSIM, Text-S): cosine of each frame's and the prompt's CLIP vectors, mean over the frames."""

    name, needs, better, needs_text = "clip_t", ("clip", "clip_text"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        return text_similarity(video, prompt) if "clip_text" in prompt else None


class ClipI(MeanMetric):
    """CLIP-I: cosine of each frame's and each reference picture's CLIP vectors, mean over both.

    A video that copies its reference wins this: read it beside `clip_t` and `copy_guard`.
    """

    name, needs, better, needs_references = "clip_i", ("clip", "clip_references"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        return reference_similarity(video, prompt, "clip") if "clip_references" in prompt else None


class DinoI(MeanMetric):
    """DINO-I: cosine of each frame's and each reference picture's DINO vectors, mean over both (DreamBooth)."""

    name, needs, better, needs_references = "dino_i", ("dino", "dino_references"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        return reference_similarity(video, prompt, "dino") if "dino_references" in prompt else None


class Subject(MeanMetric):
    """Subject similarity as MSRVTT-Personalization has it (Video Alchemist, 2501.06187); a missing one is 0.

    Cosine of the DINO tokens of each subject found in a frame and of its reference picture, mean over frames
    and references. The benchmark's own code drops the last videos where workers don't divide them; here none
    is.
    """

    name, needs, better, needs_references = "subject", ("subject", "subject_references"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        if "subject" not in video or "subject_references" not in prompt:
            return None
        return float((unit(video["subject"]) * unit(prompt["subject_references"])).sum(-1).mean())


class Face(MeanMetric):
    """Face similarity: cosine of ArcFace's vectors of each frame's and the reference's face; without one, 0."""

    name, needs, better, needs_references = "face", ("face", "face_references"), "higher", True

    def value(self, video: Features, prompt: Features) -> float | None:
        if "face_references" not in prompt:
            return None
        return reference_similarity(video, prompt, "face") if np.any(video["face"]) else 0.0


class CopyGuard(MeanMetric):
    """Copy-paste guard: likeness to the reference pictures less likeness to the words.

    A generator that shows its reference and does not do what the prompt says has a high CLIP-I and a low
    CLIP-T: the difference tells it from one that does both.
    """

    name, better = "copy_guard", "lower"
    needs = ("clip", "clip_text", "clip_references")
    needs_text = needs_references = True

    def value(self, video: Features, prompt: Features) -> float | None:
        if "clip_text" not in prompt or "clip_references" not in prompt:
            return None
        return reference_similarity(video, prompt, "clip") - text_similarity(video, prompt)


class Consistency(MeanMetric):
    """Temporal consistency: cosine of the CLIP vectors of neighbouring frames, mean over a video."""

    name, needs, better = "consistency", ("clip",), "higher"

    def value(self, video: Features, prompt: Features) -> float | None:
        frames = unit(video["clip"])
        return float((frames[1:] * frames[:-1]).sum(1).mean()) if len(frames) > 1 else None


class Flicker(MeanMetric):
    """Temporal flicker: 1 - mean absolute difference of neighbouring frames, as a share of the pixels' range.

    VBench's (255 - MAE) / 255. A still video has the best score there is: read it beside `frozen` and
    `dynamics`.
    """

    name, needs, better = "flicker", ("motion",), "higher"

    def value(self, video: Features, prompt: Features) -> float | None:
        return 1.0 - float(video["motion"].mean(dtype="float64")) if len(video["motion"]) else None


class Dynamics(MeanMetric):
    """Dynamics without weights: mean absolute difference of neighbouring frames, as a share of the range."""

    name, needs, better = "dynamics", ("motion",), "neither"

    def value(self, video: Features, prompt: Features) -> float | None:
        return float(video["motion"].mean(dtype="float64")) if len(video["motion"]) else None


class DynamicDegree(MeanMetric):
    """Dynamic degree (Dync-D of MSRVTT-Personalization, VBench): the share of videos in which much moves.

    A video counts when, in a quarter of its pairs of neighbouring frames, the mean of the 5 % greatest lengths
    of RAFT's optical flow exceeds 6 pixels for each 256 of the shorter side. The protocol looks at 8 frames a
    second.
    """

    name, needs, better = "dynamic_degree", ("raft",), "neither"

    def value(self, video: Features, prompt: Features) -> float | None:
        """`raft`: for each pair, flow as a share of the shorter side."""
        flow = video["raft"]
        if not len(flow):
            return None
        moving = int((flow > FLOW_PX / PER_PX).sum())
        return float(moving >= max(1, round(MOVING_FRAC * (len(flow) + 1))))


class Frozen(MeanMetric):
    """Frozen share: how many of the videos are stills, no two neighbouring frames of which differ."""

    name, needs, better = "frozen", ("motion",), "lower"

    def value(self, video: Features, prompt: Features) -> float | None:
        return float(video["motion"].max() < STILL) if len(video["motion"]) else None


def text_similarity(video: Features, prompt: Features) -> float:
    return float((unit(video["clip"]) @ unit(prompt["clip_text"])).mean())


def reference_similarity(video: Features, prompt: Features, network: str) -> float:
    return float((unit(video[network]) @ unit(prompt[f"{network}_references"]).T).mean())


METRICS: dict[str, type[Metric]] = {
    metric.name: metric
    for metric in (
        *(Fvd, Kvd, Fid, ClipFid, Kid, Is, IsI3d),
        *(ClipT, ClipI, DinoI, Subject, Face, CopyGuard),
        *(Consistency, Flicker, Dynamics, DynamicDegree, Frozen),
    )
}
