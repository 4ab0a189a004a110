"""Classifier-free guidance over parts of the condition, with rescaling and intervals. Pure functions.

All of them combine denoised videos D with weights that sum to 1. D is affine in the network's
answer, in the noise and in the score, so the same weights guide any of those.

A branch is named by the condition kinds that it does without (`model.condition.KINDS`); which
branches a scheme needs is in `BRANCHES`, so that the sampler encodes those prompts and no others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.condition import KINDS

Branch = frozenset[str]
FULL: Branch = frozenset()
NOTHING: Branch = frozenset(KINDS)
NO_TEXT: Branch = frozenset({"text"})
NO_RETRIEVED: Branch = frozenset({"retrieved"})
NO_IMAGE: Branch = frozenset({"subject", "frame"})
ONLY_IMAGE: Branch = frozenset({"text", "retrieved"})

Scheme = Literal["none", "cfg", "retrieval", "alchemist", "phantom"]
BRANCHES: dict[str, tuple[Branch, ...]] = {
    "none": (FULL,),
    "cfg": (FULL, NOTHING),
    "retrieval": (FULL, NO_TEXT, NO_RETRIEVED),
    "alchemist": (FULL, NO_TEXT, NO_IMAGE),
    "phantom": (FULL, ONLY_IMAGE, NOTHING),
}


def cfg(full: Tensor, nothing: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance: nothing + weight (full - nothing) (2207.12598); 1 is no guidance."""
    return nothing + weight * (full - nothing)


def retrieval(
    full: Tensor,
    no_text: Tensor,
    no_retrieved: Tensor,
    *,
    text_weight: float,
    retrieved_weight: float,
    step: int,
) -> Tensor:
    """Re-Imagen's interleaved guidance (2209.14491): steps strengthen neighbours and text in turn.

    Args:
        full: estimate with everything.
        no_text: without the text, neighbours kept.
        no_retrieved: without the neighbours, text kept; guiding away from it alone is CM3's contrast.
        text_weight: 1 is no guidance.
        retrieved_weight: 1 is no guidance.
        step: number of the sampling step; the odd ones strengthen the text.
    """
    if step % 2:
        return cfg(full, no_text, text_weight)
    return cfg(full, no_retrieved, retrieved_weight)


def alchemist(
    full: Tensor, no_text: Tensor, no_image: Tensor, *, text_scale: float, image_scale: float
) -> Tensor:
    """Video Alchemist (2501.06187, equation 2); the scales there are 8 and 3.

    e(I,T) + s_T [e(I,T) - e(I,0)] + s_I [e(I,T) - e(0,T)]
    """
    return full + text_scale * (full - no_text) + image_scale * (full - no_image)


def phantom(
    full: Tensor, only_image: Tensor, nothing: Tensor, *, image_scale: float, text_scale: float
) -> Tensor:
    """Phantom (2502.11079, equation 5); the scales there are 3 and 7.5.

    e(0) + s_I [e(I) - e(0)] + s_TI [e(T,I) - e(I)]
    """
    return nothing + image_scale * (only_image - nothing) + text_scale * (full - only_image)


def dynamic_threshold(x: Tensor, quantile: float) -> Tensor:
    """Imagen's dynamic thresholding (2205.11487, section 2.3) of `b ...` estimates.

    Clip to the quantile of |x| of each sample, at least 1, and divide by it.
    """
    limits = _quantile(x.abs().flatten(1), quantile).clamp(min=1)
    limits = limits.view(-1, *([1] * (x.ndim - 1))).to(x.dtype)
    return x.clamp(-limits, limits) / limits


def oscillating(weight: float, step: int, *, start: int = 0, low: float = 1.0) -> float:
    """Imagen Video's oscillating guidance (2210.02303): high and low in turns from step `start` on.

    Steps before `start` take the high weight; 1 as the low weight is no guidance.
    """
    return weight if step < start or (step - start) % 2 == 0 else low


@dataclass(frozen=True)
class Guidance:
    """A scheme with its weights, as the sampler calls it.

    Attributes:
        scheme: which formula.
        weight: of `cfg` (1 = none); of the text in `retrieval`; s_T of `alchemist`, s_TI of `phantom`.
        image_weight: of the neighbours in `retrieval`; s_I of `alchemist` and `phantom`.
        threshold: quantile of dynamic thresholding; None = off (latents have no bounds).
        oscillate_from: step from which the weight oscillates with 1; None = constant.
    """

    scheme: Scheme = "cfg"
    weight: float = 1.0
    image_weight: float = 1.0
    threshold: float | None = None
    oscillate_from: int | None = None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The condition kinds to leave out, one set per estimate that `combine` wants."""
        return BRANCHES[self.scheme]

    def combine(self, d: Mapping[Branch, Tensor], step: int) -> Tensor:
        """The guided estimate from one `b t c h w` estimate per branch."""
        guided = self._combine(d, self._weight(step), step)
        return guided if self.threshold is None else dynamic_threshold(guided, self.threshold)

    def _weight(self, step: int) -> float:
        if self.oscillate_from is None:
            return self.weight
        # Where the neutral weight is 0 (a scale added to the full estimate), low is 0.
        low = 0.0 if self.scheme == "alchemist" else 1.0
        return oscillating(self.weight, step, start=self.oscillate_from, low=low)

    def _combine(self, d: Mapping[Branch, Tensor], weight: float, step: int) -> Tensor:
        image = self.image_weight
        match self.scheme:
            case "none":
                return d[FULL]
            case "cfg":
                return cfg(d[FULL], d[NOTHING], weight)
            case "retrieval":
                return retrieval(
                    d[FULL], d[NO_TEXT], d[NO_RETRIEVED],
                    text_weight=weight, retrieved_weight=image, step=step,
                )  # fmt: skip
            case "alchemist":
                return alchemist(d[FULL], d[NO_TEXT], d[NO_IMAGE], text_scale=weight, image_scale=image)
            case "phantom":
                return phantom(d[FULL], d[ONLY_IMAGE], d[NOTHING], image_scale=image, text_scale=weight)


def _quantile(rows: Tensor, quantile: float) -> Tensor:
    """`b` quantiles of `b n`, by sorting; torch.quantile refuses rows of over 16 million."""
    position = round(quantile * (rows.shape[1] - 1))
    return torch.sort(rows.float(), dim=1).values[:, position]
