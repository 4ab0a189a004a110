"""A step is a function of (seed, sample): no batch, rank or order shows in it."""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportOptionalOperand=false, reportArgumentType=false

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.backbones.dit import DitConfig
from model.condition import KINDS
from model.edm import edm_for
from model.generator import Generator, start_upsampler
from model.step import (
    accumulate,
    draw,
    draw_dropped,
    draw_num_documents,
    losses,
    sample_generator,
    sample_key,
)

SHAPE = (4, 3, 12, 16)
EDM = edm_for(4, 12, 16)


def _videos(batch: int = 4) -> torch.Tensor:
    return torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


@given(st.integers(0, 2**62), st.integers(0, 2**62), st.integers(0, 2**62))
@settings(deadline=None)
def test_keys_differ_by_seed_sample_and_stream(seed: int, index: int, other: int) -> None:
    key = sample_key(seed, index, "noise")
    assert 0 <= key < 2**63
    assert key == sample_key(seed, index, "noise") != sample_key(seed, index, "sigma")
    if other != index:
        assert key != sample_key(seed, other, "noise")
    if other != seed:
        assert key != sample_key(other, index, "noise")


def test_keys_are_the_same_on_every_machine_and_for_ever() -> None:
    assert sample_key(0, 0, "noise") == 668678635350050387
    assert sample_key(7, 1_000_000_007, "dropout") == 5726351129911837275


def test_streams_are_uncorrelated() -> None:
    draws = torch.stack([torch.randn(2000, generator=sample_generator(0, i, s)) for i in (0, 1) for s in "ab"])
    off_diagonal = torch.corrcoef(draws) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.08


def test_draws_of_a_sample_do_not_depend_on_its_batch() -> None:
    together = draw(EDM, SHAPE, seed=3, indices=[10, 11, 12], max_small_level=0.5)
    alone = draw(EDM, SHAPE, seed=3, indices=[11], max_small_level=0.5)
    assert torch.equal(together.eps[1:2], alone.eps)
    assert torch.equal(together.sigma[1:2], alone.sigma)
    assert torch.equal(together.keys[1:2], alone.keys)
    assert torch.equal(together.self_conditioned[1:2], alone.self_conditioned)
    assert torch.equal(together.small.video[1:2], alone.small.video)
    assert torch.equal(together.small.level[1:2], alone.small.level)


def test_drawn_rates_are_the_asked_ones() -> None:
    draws = draw(EDM, (1, 1, 1, 1), seed=0, indices=range(4000), self_condition_rate=0.9)
    assert draws.self_conditioned.float().mean().item() == pytest.approx(0.9, abs=0.02)
    assert draws.sigma.log().mean().item() == pytest.approx(-1.2, abs=0.08)
    rates = {"text": 0.1, "subject": 0.3, "all": 0.05}
    dropped = [draw_dropped(rates, seed=0, index=i) for i in range(4000)]
    share = {k: sum(k in d for d in dropped) / 4000 for k in KINDS}
    expected = {"text": 0.145, "subject": 0.335, "retrieved": 0.05, "frame": 0.05}
    assert share == pytest.approx(expected, abs=0.025)


def test_dropping_one_kind_more_often_keeps_the_other_draws() -> None:
    """A change of one rate must not reshuffle what the other kinds meet."""
    for index in range(50):
        low = draw_dropped({"text": 0.1, "subject": 0.3}, seed=0, index=index)
        high = draw_dropped({"text": 0.9, "subject": 0.3}, seed=0, index=index)
        assert low - {"text"} == high - {"text"}
        assert low <= high


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="audio"):
        draw_dropped({"audio": 0.1}, seed=0, index=0)


def test_every_number_of_documents_is_drawn() -> None:
    drawn = [draw_num_documents((0, 1, 2), seed=0, index=i) for i in range(600)]
    assert all(150 < drawn.count(k) < 250 for k in (0, 1, 2))


@pytest.fixture
def setting(make_generator, make_condition, tiny_fit):
    return make_generator(replace(tiny_fit, dropout=0.2)), make_condition(batch=4)


def test_losses_of_a_sample_do_not_depend_on_its_batch(setting) -> None:
    model, condition = setting
    draws = draw(EDM, SHAPE, seed=0, indices=[5, 6, 7, 8], self_condition_rate=0.5)
    together = losses(model, EDM, _videos(), condition, draws)
    for i in range(4):
        one = draw(EDM, SHAPE, seed=0, indices=[5 + i], self_condition_rate=0.5)
        alone = losses(model, EDM, _videos()[i : i + 1], condition.select(torch.tensor([i])), one)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_any_split_into_micro_batches_gives_the_same_gradients(setting) -> None:
    model, condition = setting
    found = []
    for parts in ([[0, 1, 2, 3]], [[0], [1, 2], [3]]):
        model.zero_grad()
        for part in parts:
            rows = torch.tensor(part)
            draws = draw(EDM, SHAPE, seed=0, indices=part)
            accumulate(model, EDM, _videos()[rows], condition.select(rows), draws, divisor=4)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_self_conditioned_latents_carry_no_gradient(setting) -> None:
    """With a stopped gradient, the loss's gradient equals that with the latents as constants."""
    model, condition = setting
    draws = draw(EDM, SHAPE, seed=0, indices=[0, 1, 2, 3], self_condition_rate=1.0)
    accumulate(model, EDM, _videos(), condition, draws, divisor=4)
    found = [p.grad.clone() for p in model.parameters()]
    x_sigma = EDM.add_noise(_videos(), draws.eps, draws.sigma)
    x = x_sigma * EDM.c_in(draws.sigma).view(-1, 1, 1, 1, 1)
    _, z = model(x, draws.sigma, condition, None, keys=draws.keys)
    model.zero_grad()
    f, _ = model(x, draws.sigma, condition, z.detach().clone(), keys=draws.keys)
    (EDM.loss(f, _videos(), draws.eps, draws.sigma).sum() / 4).backward()
    for p, g in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_only_drawn_samples_are_self_conditioned(setting) -> None:
    model, condition = setting
    some = draw(EDM, SHAPE, seed=0, indices=[0, 1, 2, 3], self_condition_rate=0.5)
    assert some.self_conditioned.any()
    assert not some.self_conditioned.all()
    with_first_pass = losses(model, EDM, _videos(), condition, some)
    without = losses(model, EDM, _videos(), condition, replace(some, self_conditioned=None))
    same = (with_first_pass - without).abs() < 1e-6
    assert torch.equal(same, ~some.self_conditioned)


def test_a_model_without_latents_makes_no_first_pass_on_any_number_of_ranks(make_generator, setting) -> None:
    class Wrapped(torch.nn.Module):  # as DistributedDataParallel wraps
        def __init__(self, module: Generator) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args, **options):
            passes.append(options.get("latents_only", False))
            return self.module(*args, **options)

    draws = draw(EDM, SHAPE, seed=0, indices=[0, 1, 2, 3], self_condition_rate=1.0)
    dit = make_generator(DitConfig(num_frames=4, height_px=12, width_px=16, dim=32, head_dim=16, num_blocks=1))
    for model, expected in ((dit, [False]), (setting[0], [True, False])):
        passes: list[bool] = []
        losses(Wrapped(model), EDM, _videos(), setting[1], draws)
        assert passes == expected


def test_validation_has_no_dropout(setting) -> None:
    model, condition = setting
    draws = draw(EDM, SHAPE, seed=0, indices=[0, 1, 2, 3])
    other_keys = replace(draws, keys=draws.keys + 1)
    quiet = losses(model, EDM, _videos(), condition, draws, dropout=False)
    assert torch.equal(quiet, losses(model, EDM, _videos(), condition, other_keys, dropout=False))
    assert not torch.equal(quiet, losses(model, EDM, _videos(), condition, draws))


def test_bf16_loss_is_close_to_float32(setting) -> None:
    model, condition = setting
    draws = draw(EDM, SHAPE, seed=0, indices=[0, 1, 2, 3])
    exact = losses(model, EDM, _videos(), condition, draws)
    rough = losses(model, EDM, _videos(), condition, draws, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)


def test_upsampler_reads_the_small_video_and_starts_from_the_base(
    make_generator, make_condition, tiny_fit
) -> None:
    base, condition = make_generator(tiny_fit), make_condition(batch=2)
    up: Generator = make_generator(replace(tiny_fit, in_channels=6))
    fresh = start_upsampler(up, base)
    assert fresh == ["level.weight", "level.bias"]
    assert torch.equal(up.backbone.embed.weight[:, :48], base.backbone.embed.weight)
    assert not up.backbone.embed.weight[:, 48:].any()
    torch.nn.init.normal_(up.backbone.embed.weight)
    draws = draw(EDM, SHAPE, seed=0, indices=[0, 1], max_small_level=0.5)
    videos = _videos(2)
    got = losses(up, EDM, videos, condition, draws, small_size=(6, 8))
    blind = replace(draws, small=replace(draws.small, video=draws.small.video * 3))
    assert not torch.allclose(got, losses(up, EDM, videos, condition, blind, small_size=(6, 8)))
    with pytest.raises(ValueError, match="small video"):
        losses(up, EDM, videos, condition, replace(draws, small=None))


def test_channels_of_the_small_video_come_after_those_of_the_noisy_one(
    make_generator, make_condition, tiny_fit
) -> None:
    """The started upsampler answers as the base does (but for its level token, silenced here)."""
    base, condition = make_generator(tiny_fit), make_condition(batch=2)
    up = make_generator(replace(tiny_fit, in_channels=6))
    start_upsampler(up, base)
    draws = draw(EDM, SHAPE, seed=0, indices=[0, 1], max_small_level=0.5)
    ours = up.backbone(torch.cat([draws.eps, draws.small.video], dim=2), *up.embedder(draws.sigma, condition))
    theirs = base.backbone(draws.eps, *base.embedder(draws.sigma, condition))
    torch.testing.assert_close(ours, theirs)


def test_physics_needs_torch_and_nothing_else() -> None:
    """A bare GPU box with torch alone can train: none of the house's other needs is imported."""
    code = (
        "import sys, model.step, model.sample, model.optim, model.ema, model.backbones.presets\n"
        "heavy = {'ray', 'transformers', 'diffusers', 'open_clip', 'pyarrow', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
