"""KVD: kernel distance between I3D's logits of real and sampled videos (Unterthiner et al., 1812.01717)."""

from model.evaluate.distributions import KernelMetric


class Kvd(KernelMetric):
    name, needs = "kvd", ("i3d",)
