"""KID: kernel distance between Inception's features of the middle frames of real and sampled videos."""

from model.evaluate.distributions import KernelMetric


class Kid(KernelMetric):
    name, needs = "kid", ("inception",)
