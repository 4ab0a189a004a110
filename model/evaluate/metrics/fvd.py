"""FVD: Fréchet distance between I3D's logits of real and sampled videos (Unterthiner et al., 1812.01717)."""

from model.evaluate.distributions import FrechetMetric


class Fvd(FrechetMetric):
    name, needs = "fvd", ("i3d",)
