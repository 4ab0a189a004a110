"""Inception scores of the sampled videos: IS by a C3D of UCF101 as papers have it, and one by I3D's classes.

They are two metrics: one network's score says nothing beside another's.
"""

from model.evaluate.distributions import InceptionScore


class Is(InceptionScore):
    name, needs = "is", ("c3d",)


class IsI3d(InceptionScore):
    name, needs = "is_i3d", ("i3d",)
