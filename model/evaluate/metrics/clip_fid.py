"""CLIP-FID: Fréchet distance between CLIP's vectors of all frames, as MSR-VTT's protocol has it."""

from model.evaluate.distributions import FrechetMetric


class ClipFid(FrechetMetric):
    name, needs = "clip_fid", ("clip",)
