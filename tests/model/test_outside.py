"""A backbone and an optimizer from outside train, resume and are counted, with no product file edited."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from infra.errors import ConfigError
from model.backbones.presets import preset
from model.condition import ConditionConfig
from model.cost import activation_bytes, training_flops
from model.edm import edm_for
from model.generator import Generator
from model.guidance import FULL
from model.optim import make_optimizer
from model.sample import Denoiser, sample_ode
from model.space import PIXELS
from model.step import accumulate, draw
from model.training.config import OptimConfig, Stage1Config
from model.training.preflight import check_backbone
from tests.model.runs import advance, fingerprint, open_training, unbroken
from tests.model.small_model import small_model, train_small

BACKBONE, OPTIMIZER = "tests.model.toys:TOY", "tests.model.toys:rmsprop"


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(OPTIMIZER, model, lr=1e-3, weight_decay=0.0)


def test_a_backbone_of_ones_own_trains_and_samples(make_condition) -> None:
    config = preset(BACKBONE, num_frames=4, height_px=12, width_px=16)
    torch.manual_seed(0)
    model, edm, condition = (
        Generator(config, ConditionConfig(token_dim=24)),
        edm_for(4, 12, 16),
        make_condition(),
    )
    optimizer, videos, seen = _optimizer(model), torch.zeros(2, 4, 3, 12, 16), []
    for step in range(30):
        draws = draw(edm, videos.shape[1:], seed=0, indices=[2 * step, 2 * step + 1])
        seen.append(accumulate(model, edm, videos, condition, draws, divisor=2).mean().item())
        optimizer.step()
        optimizer.zero_grad()
    assert sum(seen[-10:]) < sum(seen[:10])
    sampled = sample_ode(
        Denoiser(model, edm, {FULL: condition}), edm, torch.randn(2, 4, 3, 12, 16), num_steps=2
    )
    assert sampled.shape == videos.shape and sampled.isfinite().all()


def test_its_cost_is_counted() -> None:
    """By hand: 2 FLOPs a multiply-add; no gradient for the noisy video, nor for what the encoder says."""
    config, condition = preset(BACKBONE, num_frames=2, height_px=4, width_px=4), ConditionConfig(token_dim=8)
    pixels, scalars, prompt, tell = 32, 4 * 64 * 32 * 2, 5 * 8 * 32 * 2, 32 * 16 * 2
    entry, blocks, head = pixels * 3 * 16 * 2, 2 * pixels * 16 * 16 * 2, pixels * 16 * 3 * 2
    counted = training_flops(config, condition, prompt_tokens=5)
    assert counted["first pass"] == 0
    assert counted["forward"] == scalars + prompt + tell + entry + blocks + head
    assert counted["backward"] == scalars + prompt + entry + 2 * (tell + blocks + head)
    one, two = (
        activation_bytes(config, condition, batch=b, prompt_tokens=5, half=False)["stored"] for b in (1, 2)
    )
    assert 1.9 < two / one <= 2


def test_an_optimizer_of_ones_own_starts_with_its_state_in_place_and_resumes_exactly() -> None:
    whole, first, second = small_model(), small_model(), small_model(seed=1)
    train_small(whole, _optimizer(whole), 6)
    before = _optimizer(first)
    assert all(not v.any() for state in before.state.values() for v in state.values())
    train_small(first, before, 3)
    second.load_state_dict(first.state_dict())
    after = _optimizer(second)
    for ours, theirs in zip(second.parameters(), first.parameters(), strict=True):
        assert after.state[ours].keys() == before.state[theirs].keys() != set()
        for key, value in after.state[ours].items():
            value.copy_(before.state[theirs][key])
    train_small(second, after, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_run_with_both_resumes_bit_for_bit(stage_values: Callable[..., dict[str, Any]], tmp_path) -> None:
    values = stage_values(
        preset=BACKBONE, backbone={}, optim={"name": OPTIMIZER, "lr": 1e-3}, samples=16,
        out=str(tmp_path / "whole"),
    )  # fmt: skip
    config = Stage1Config.model_validate(values)
    expected = unbroken(config, 4)
    config = config.model_copy(update={"out": str(tmp_path / "broken")})
    first = open_training(config)
    advance(first, 2)
    first.save({})
    first.close()
    second = open_training(config)
    assert second.position == first.position
    advance(second, 2)
    assert fingerprint(second) == expected
    second.close()


def test_unknown_names_are_refused_with_the_known_ones(stage_values: Callable[..., dict[str, Any]]) -> None:
    for name in ("sgd", "tests.model.toys:nothing", "no.such.module:rmsprop"):
        with pytest.raises(ValidationError, match=name):
            OptimConfig(name=name)
        config = Stage1Config.model_validate(stage_values(preset=name))
        with pytest.raises(ConfigError, match=name):
            check_backbone(config, PIXELS)
