"""FID: Fréchet distance between Inception's features of all frames of real and sampled videos."""

from model.evaluate.distributions import FrechetMetric


class Fid(FrechetMetric):
    name, needs = "fid", ("inception",)
