"""What a condition is, how batches of them are joined, and how they are embedded."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from model.condition import (
    KINDS,
    NUM_SCALARS,
    ConditionConfig,
    ConditionEmbedder,
    concat_conditions,
    fourier_features,
)
from pipeline.schema import ROLES, Role

SIGMA = torch.tensor([0.5, 2.0])


@pytest.fixture
def embedder() -> ConditionEmbedder:
    torch.manual_seed(0)
    return ConditionEmbedder(ConditionConfig(token_dim=24), 32)


def test_roles_keep_their_numbers() -> None:
    first = ["caption", "instruction", "retrieved", "subject", "background", "first_frame"]
    assert list(ROLES)[: len(first)] == first  # checkpoints hold embeddings in this order
    assert set(Role) <= ROLES.keys()


def test_every_role_belongs_to_a_kind_and_every_kind_has_a_role() -> None:
    assert {facts.kind for facts in ROLES.values()} == set(KINDS)


def test_tokens_are_scalars_then_prompt(embedder, make_condition) -> None:
    condition = make_condition()
    tokens, mask = embedder(SIGMA, condition)
    assert tokens.shape == (2, NUM_SCALARS + 5, 32)
    assert mask[:, :NUM_SCALARS].all()
    assert torch.equal(mask[:, NUM_SCALARS:], condition.mask)


def test_noise_rate_and_size_each_change_their_own_token(embedder, make_condition) -> None:
    condition = make_condition()
    before, _ = embedder(SIGMA, condition)
    changed = [
        embedder(SIGMA * 2, condition)[0],
        embedder(SIGMA, _replace(condition, fps=torch.tensor([24.0, 24.0])))[0],
        embedder(SIGMA, _replace(condition, original_size_px=torch.tensor([[64, 64]] * 2)))[0],
    ]
    for place, after in enumerate(changed):
        differs = (before != after).any(dim=-1).all(dim=0)
        assert differs.nonzero().flatten().tolist() == [place]


def _replace(condition, **changes):
    return type(condition)(**{**vars(condition), **changes})


def test_infinite_frame_rate_is_a_finite_token(embedder, make_condition) -> None:
    pictures = _replace(make_condition(), fps=torch.tensor([torch.inf, torch.inf]))
    assert embedder(SIGMA, pictures)[0].isfinite().all()


def test_role_and_segment_are_embedded(embedder, make_condition) -> None:
    condition = make_condition()
    before, _ = embedder(SIGMA, condition)
    for name in ("role", "segment"):
        other = (getattr(condition, name) + 1) % 4
        after, _ = embedder(SIGMA, _replace(condition, **{name: other}))
        assert not torch.allclose(before[:, NUM_SCALARS:], after[:, NUM_SCALARS:])


def test_late_segments_share_the_last_embedding(embedder, make_condition) -> None:
    late = _replace(make_condition(), segment=torch.full((2, 5), 999))
    assert embedder(SIGMA, late)[0].isfinite().all()


def test_plus_appends_reference_patches_with_their_mask(make_condition) -> None:
    torch.manual_seed(0)
    embedder = ConditionEmbedder(ConditionConfig(token_dim=24, mode="plus"), 32)
    condition = make_condition(references=2)
    condition.reference_mask[0, 1] = False
    tokens, mask = embedder(SIGMA, condition)
    assert tokens.shape == (2, NUM_SCALARS + 5 + 2 * 4, 32)
    assert mask[0, -8:].tolist() == [True] * 4 + [False] * 4
    assert mask[1, -8:].all()


def test_what_is_seen_is_tied_to_its_place_in_the_prompt(make_condition) -> None:
    """Not to the order among the pictures: a patch bears what the encoder's tokens of that segment bear."""
    embedder = ConditionEmbedder(ConditionConfig(token_dim=24, mode="plus"), 32)
    condition = make_condition(references=2)
    condition.references[:, 1] = condition.references[:, 0]
    condition.reference_role[:, 1] = condition.reference_role[:, 0]
    apart, _ = embedder(SIGMA, condition)
    assert not torch.isclose(apart[:, -8:-4], apart[:, -4:]).all(dim=-1).any()
    turned, _ = embedder(SIGMA, _replace(condition, reference_place=condition.reference_place.flip(1)))
    assert torch.equal(turned[:, -8:-4], apart[:, -4:])
    with torch.no_grad():
        embedder.segment.weight[1] += 1.0
    moved, _ = embedder(SIGMA, condition)
    changed = (moved != apart).any(dim=-1)
    assert torch.equal(changed[:, NUM_SCALARS:-8], condition.segment == 1)
    assert changed[:, -4:].all() and not changed[:, -8:-4].any()


def test_the_same_picture_in_another_role_gives_other_tokens(make_condition) -> None:
    embedder = ConditionEmbedder(ConditionConfig(token_dim=24, mode="plus"), 32)
    condition = make_condition(references=2)
    shown_as = {
        role: embedder(SIGMA, _replace(condition, reference_role=torch.full((2, 2), number)))[0]
        for number, role in enumerate(ROLES)
        if ROLES[role].kind != "text"
    }
    assert len(shown_as) > 3
    for one, other in combinations(shown_as.values(), 2):
        assert torch.equal(one[:, :-8], other[:, :-8])
        assert not torch.isclose(one[:, -8:], other[:, -8:]).all(dim=-1).any()


def test_faithful_leaves_reference_pixels_out(embedder, make_condition) -> None:
    assert embedder(SIGMA, make_condition(references=2))[0].shape[1] == NUM_SCALARS + 5


def test_odd_references_are_refused(make_condition) -> None:
    embedder = ConditionEmbedder(ConditionConfig(token_dim=24, mode="plus"), 32)
    odd = _replace(make_condition(references=1), references=torch.zeros(2, 1, 3, 15, 16))
    with pytest.raises(ValueError, match="15x16"):
        embedder(SIGMA, odd)
    with pytest.raises(ValueError, match="reference_role"):
        embedder(SIGMA, _replace(make_condition(references=1), reference_role=None))
    with pytest.raises(ValueError, match="reference_place"):
        embedder(SIGMA, _replace(make_condition(references=1), reference_place=None))
    many = make_condition(references=9)
    with pytest.raises(ValueError, match="legal: at most 8"):
        embedder(SIGMA, many)


def test_joined_batches_embed_as_they_did_alone(embedder, make_condition) -> None:
    short, long = make_condition(length=3, seed=1), make_condition(length=6, seed=2)
    joined = concat_conditions([short, long])
    assert len(joined) == 4
    tokens, mask = embedder(torch.cat([SIGMA, SIGMA]), joined)
    alone, alone_mask = embedder(SIGMA, short)
    torch.testing.assert_close(tokens[:2, : NUM_SCALARS + 3], alone)
    assert torch.equal(mask[:2, : NUM_SCALARS + 3], alone_mask)
    assert not mask[:2, NUM_SCALARS + 3 :].any()


def test_mixing_with_and_without_references_is_refused(make_condition) -> None:
    with pytest.raises(ValueError, match="references"):
        concat_conditions([make_condition(), make_condition(references=1)])


def test_select_takes_rows_in_order(make_condition) -> None:
    condition = make_condition(batch=3, references=1)
    picked = condition.select(torch.tensor([2, 0]))
    assert torch.equal(picked.tokens, condition.tokens[[2, 0]])
    assert torch.equal(picked.references, condition.references[[2, 0]])
    assert torch.equal(picked.reference_role, condition.reference_role[[2, 0]])
    assert picked.has_first_frame is None


def test_branches_that_lack_the_first_frame_join_those_that_have_it(make_condition) -> None:
    given = replace(make_condition(), has_first_frame=torch.tensor([True, False]))
    joined = concat_conditions([given, make_condition()])
    assert joined.has_first_frame is not None
    assert joined.has_first_frame.tolist() == [True, False, False, False]


def test_a_hidden_prompt_leaves_rate_and_size(embedder, make_condition) -> None:
    condition = make_condition()
    nothing = replace(condition, mask=torch.zeros_like(condition.mask))
    tokens, mask = embedder(SIGMA, nothing)
    assert mask.sum(dim=1).tolist() == [NUM_SCALARS] * 2
    assert torch.equal(tokens[:, :NUM_SCALARS], embedder(SIGMA, condition)[0][:, :NUM_SCALARS])


def test_half_precision_touches_tokens_only(make_condition) -> None:
    moved = make_condition(references=1).to("cpu", torch.bfloat16)
    assert moved.tokens.dtype == moved.references.dtype == torch.bfloat16
    assert moved.fps.dtype == torch.float32
    assert moved.mask.dtype == torch.bool


def test_features_tell_near_values_apart() -> None:
    x = torch.linspace(-2, 2, 400)
    features = fourier_features(x)
    assert (torch.cdist(features, features) + torch.eye(400) * 9).min() > 0.05
