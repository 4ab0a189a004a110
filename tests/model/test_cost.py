"""What `describe` prints is exact, or within its stated bound, against the network that it describes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model.backbones.dit import DitConfig
from model.backbones.presets import preset
from model.condition import ConditionConfig
from model.cost import activation_bytes, count_parameters, describe, forward_flops, render, training_flops
from model.edm import edm_for
from model.generator import Generator
from model.step import accumulate, draw

DIT = DitConfig(num_frames=4, height_px=12, width_px=16, dim=32, head_dim=16, condition_dim=24, num_blocks=2)


@pytest.mark.parametrize(
    "kind", ["fit", "dit", "upsampler", "short", "fit of another size", "dit of another size"]
)
def test_a_sample_counts_as_in_a_real_step_with_or_without_recomputation(
    tiny_fit, make_condition, kind: str
) -> None:
    """Whatever the weights' state, the batch and the draws, the step of `model.step` is what was counted."""
    backbone = DIT if kind.startswith("dit") else replace(tiny_fit, in_channels=6 if kind == "upsampler" else 3)
    condition = ConditionConfig(token_dim=24)
    shape = (2 if kind == "short" else 4, *((16, 12) if "size" in kind else (12, 16)))
    model, edm, videos = (
        Generator(backbone, condition),
        edm_for(4, 12, 16),
        torch.zeros(2, shape[0], 3, *shape[1:]),
    )
    small = 0.5 if model.is_upsampler else None
    draws = draw(edm, videos.shape[1:], seed=0, indices=[0, 1], max_small_level=small)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        accumulate(model, edm, videos, make_condition(), draws, divisor=2, small_size=(6, 8))
    before = torch.get_rng_state()
    for recompute in (False, True):
        again = replace(backbone, checkpoint=recompute)
        found = training_flops(again, condition, prompt_tokens=5, shape=shape)
        assert counted.get_total_flops() == 2 * found["total"]
    assert torch.equal(torch.get_rng_state(), before)


def test_flops_are_those_of_the_closed_forms() -> None:
    """Two FLOPs a multiply-add of products and attention; backward twice as much, less what nobody trains."""
    d, c, n, k, e = 32, 24, 48, 8, 24  # patches' width, tokens' width, patches, tokens, encoder's width
    embedder = 2 * (4 * 64 * c + 5 * e * c)
    entry = head = 2 * n * 48 * d
    modulate = 2 * (c * d + 6 * d * d)
    own, cross = 2 * n * 4 * d * d + 4 * n * n * d, 2 * (2 * n * d * d + 2 * k * c * d) + 4 * n * k * d
    inner = 2 * (own + cross + 2 * 2 * n * 4 * d * d)
    forward = forward_flops(DIT, ConditionConfig(token_dim=e), prompt_tokens=5)
    assert forward["total"] == embedder + entry + modulate + inner + head
    found = training_flops(DIT, ConditionConfig(token_dim=e), prompt_tokens=5)
    assert (found["first pass"], found["forward"]) == (0, forward["total"])
    assert found["backward"] == 2 * forward["total"] - embedder - entry


@pytest.mark.parametrize(
    ("name", "forward", "training"),
    [
        ("fit-500m", 702_810_030_080, 2_765_463_093_248),
        ("fit-tiny", 1_403_650_048, 5_229_707_264),
        ("dit-small", 218_417_332_224, 655_099_822_080),
    ],
)
def test_cost_of_the_presets_is_what_it_was(name: str, forward: int, training: int) -> None:
    parts = forward_flops(preset(name), ConditionConfig(), prompt_tokens=128)
    assert parts["total"] == forward == sum(parts.values()) - parts["total"]
    assert training_flops(preset(name), ConditionConfig(), prompt_tokens=128)["total"] == training


def test_without_self_conditioning_there_is_no_first_pass(tiny_fit) -> None:
    condition = ConditionConfig(token_dim=24)
    with_, without = (
        training_flops(tiny_fit, condition, prompt_tokens=5, self_condition_rate=rate) for rate in (0.9, 0)
    )
    assert without["first pass"] == 0 < with_["first pass"] < with_["forward"]
    assert without["forward"] < with_["forward"]


def test_parameters_are_counted_without_memory(tiny_fit) -> None:
    condition = ConditionConfig(token_dim=24, mode="plus")
    real = sum(p.numel() for p in Generator(tiny_fit, condition).parameters())
    assert count_parameters(tiny_fit, condition)["total"] == real


@pytest.mark.parametrize(
    ("name", "changes", "half"),
    [
        ("fit-tiny", {}, False),
        ("fit-tiny", {"checkpoint": True}, False),
        ("fit-tiny", {}, True),
        ("fit-tiny", {"half_streams": True}, True),
        ("fit-tiny", {"qk_norm": True}, False),
        ("fit-tiny", {"checkpoint": True}, True),
        ("dit-tiny", {}, True),
    ],
)
def test_activation_memory_is_within_a_tenth_of_the_measured_peak(
    make_condition, name: str, changes: dict[str, bool], half: bool
) -> None:
    backbone = preset(name, num_frames=4, **changes)
    condition = ConditionConfig(token_dim=24)
    model, prompts = Generator(backbone, condition), make_condition(length=20)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(2, backbone.num_frames, 3, backbone.height_px, backbone.width_px)
    z = torch.zeros(2, *model.z_shape) if model.z_shape[0] else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            answer, _ = model(x, torch.ones(2), prompts, z)
        answer.float().square().mean().backward()
    estimate = activation_bytes(backbone, condition, batch=2, prompt_tokens=20, half=half)
    kept = estimate["checkpointed" if backbone.checkpoint else "stored"]
    assert kept == pytest.approx(_peak_bytes(profiler), rel=0.1)


def _peak_bytes(profiler: profile) -> int:
    """Highest sum of all allocations so far, from the profiler's own events."""
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    changes, todo = [], list(results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        size = getattr(event.extra_fields, "alloc_size", None)
        if size is not None:
            changes.append((event.start_time_ns, size))
    live = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        live += size
        peak = max(peak, live)
    return peak


def test_page_of_the_largest_preset_tells_what_table_8_tells() -> None:
    d = describe("fit-3.9b")
    assert d["tokens"]["patches"] == 2560
    assert d["tokens"]["latents"] == 768
    assert d["tokens"]["patches per group"] == 320
    assert d["sigma_in"] == 4
    assert round(d["parameters"]["total"] / 1e9, 3) == 3.905
    assert d["activation_bytes"]["checkpointed"] < d["activation_bytes"]["stored"] / 3
    page = render(d)
    assert "3.905 G" in page
    assert "think_ff" in page


def test_references_cost_what_their_tokens_cost() -> None:
    """Two of 224 px in patches of 16: 392 tokens more to read, and nothing where they are not asked for."""
    without, with_ = describe("fit-tiny"), describe("fit-tiny", references=(2, 224, 224), batch=2)
    assert with_["tokens"]["2 reference(s)"] == 2 * 14 * 14
    assert with_["tokens"]["condition"] - without["tokens"]["condition"] == 392
    dim, patch = 128, 3 * 16 * 16
    embedded = 2 * 392 * dim * patch + 2 * 196 * 128 * dim  # patches; their places, once
    assert with_["forward_flops"]["embedder"] - without["forward_flops"]["embedder"] == embedded
    assert with_["forward_flops"]["read_condition"] > 2 * without["forward_flops"]["read_condition"]
    for name in ("training_flops", "parameters"):
        assert with_[name]["total"] > without[name]["total"]
    more = describe("fit-tiny", batch=2)["activation_bytes"]
    assert with_["activation_bytes"]["stored"] > more["stored"]
    assert "2 reference(s)" in render(with_)


def test_upsampler_is_described_without_a_large_machine() -> None:
    d = describe("fit-3.9b-upsampler")
    assert d["tokens"]["patches"] == 147_456
    assert d["tokens"]["latents per group"] == 24
    assert d["sigma_in"] == 32


def test_unknown_preset_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match="fit-500m"):
        describe("fit-9b")
    with pytest.raises(ValueError, match="depth"):
        describe("fit-tiny", depth=3)
