"""Each guidance formula, pinned by a property that a wrong sign or a swapped branch would break."""

# pyright: reportArgumentType=false

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.condition import KINDS
from model.edm import Edm
from model.guidance import (
    BRANCHES,
    FULL,
    NO_IMAGE,
    NO_RETRIEVED,
    NO_TEXT,
    NOTHING,
    ONLY_IMAGE,
    Guidance,
    alchemist,
    cfg,
    dynamic_threshold,
    oscillating,
    phantom,
    retrieval,
)

WEIGHTS = st.floats(-4, 12)


def _estimates(seed: int = 0) -> dict[frozenset[str], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    branches = [FULL, NOTHING, NO_TEXT, NO_RETRIEVED, NO_IMAGE, ONLY_IMAGE]
    return {b: torch.randn(2, 2, 3, 4, 4, generator=g, dtype=torch.float64) for b in branches}


@pytest.mark.parametrize("scheme", list(BRANCHES))
@settings(deadline=None, max_examples=20)
@given(WEIGHTS, WEIGHTS)
def test_equal_estimates_are_left_alone(scheme, weight: float, image: float) -> None:
    """Weights sum to 1: where the condition tells nothing, guidance does nothing."""
    guidance = Guidance(scheme, weight=weight, image_weight=image)
    same = torch.full((1, 1, 3, 2, 2), 0.7, dtype=torch.float64)
    combined = guidance.combine(dict.fromkeys(guidance.branches, same), step=3)
    torch.testing.assert_close(combined, same)


@pytest.mark.parametrize("scheme", list(BRANCHES))
def test_guiding_videos_equals_guiding_scores(scheme) -> None:
    """D is affine in the score, so a scheme commutes with the change from one to the other."""
    edm, sigma = Edm(sigma_in=4), 0.7
    d, x = _estimates(), torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    guidance = Guidance(scheme, weight=5.0, image_weight=2.0)
    scores = {b: -edm.ode(x, v, sigma) / sigma for b, v in d.items()}
    from_videos = -edm.ode(x, guidance.combine(d, step=0), sigma) / sigma
    torch.testing.assert_close(guidance.combine(scores, step=0), from_videos)


def test_neutral_weights_return_the_full_estimate() -> None:
    d = _estimates()
    for neutral in (
        Guidance("none"),
        Guidance("cfg", weight=1),
        Guidance("retrieval", weight=1, image_weight=1),
        Guidance("alchemist", weight=0, image_weight=0),
        Guidance("phantom", weight=1, image_weight=1),
    ):
        torch.testing.assert_close(neutral.combine(d, step=0), d[FULL])


def test_cfg_moves_away_from_the_unconditional() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    assert cfg(one, zero, 7.5).item() == 7.5
    assert cfg(one, zero, 0).item() == 0


def test_alchemist_separates_text_from_images() -> None:
    """Each scale pushes along what its own modality adds, and along nothing else."""
    base = torch.zeros(3)
    text, image = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
    full = base + text + image
    got = alchemist(full, base + image, base + text, text_scale=8, image_scale=3)
    assert got.tolist() == [9, 4, 0]


def test_phantom_climbs_from_nothing_over_images_to_text() -> None:
    nothing, image = torch.zeros(3), torch.tensor([0.0, 1, 0])
    full = image + torch.tensor([1.0, 0, 0])
    assert phantom(full, image, nothing, image_scale=3, text_scale=7.5).tolist() == [7.5, 3, 0]


def test_retrieval_guidance_takes_turns() -> None:
    full, without = torch.ones(1), torch.zeros(1)
    turns = [
        retrieval(full, without, without, text_weight=10, retrieved_weight=2, step=step).item()
        for step in range(4)
    ]
    assert turns == [2, 10, 2, 10]


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 8), st.floats(0.9, 1.0))
def test_thresholded_videos_stay_in_bounds(scale: float, quantile: float) -> None:
    x = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scale
    got = dynamic_threshold(x, quantile)
    assert got.abs().max() <= 1 + 1e-6
    assert (got.sign() == x.sign()).all()


def test_threshold_leaves_videos_within_bounds_alone() -> None:
    x = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    assert torch.equal(dynamic_threshold(x, 0.995), x)


def test_threshold_is_per_sample() -> None:
    x = torch.randn(1, 2, 3, 8, 8) * 0.2
    both = torch.cat([x, x * 50])
    assert torch.equal(dynamic_threshold(both, 0.995)[:1], dynamic_threshold(x, 0.995))


def test_guidance_oscillates_after_its_start() -> None:
    weights = [oscillating(8, step, start=3) for step in range(8)]
    assert weights == [8, 8, 8, 8, 1, 8, 1, 8]


def test_oscillating_schemes_rest_at_the_full_estimate() -> None:
    d = _estimates()
    for scheme, image in (("cfg", 1), ("alchemist", 0), ("phantom", 1)):
        guidance = Guidance(scheme, weight=6, image_weight=image, oscillate_from=0)
        torch.testing.assert_close(guidance.combine(d, step=1), d[FULL])
        assert not torch.allclose(guidance.combine(d, step=0), d[FULL])


def test_branches_name_kinds_that_exist() -> None:
    assert all(branch <= set(KINDS) for branches in BRANCHES.values() for branch in branches)
