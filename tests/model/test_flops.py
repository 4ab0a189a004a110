"""What `describe` prints is exact, or within its stated bound, against torch's own counters."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model.condition import ConditionConfig
from model.cost.describe import describe, render
from model.cost.flops import count_parameters, forward_flops, sizes, training_flops
from model.cost.memory import activation_bytes
from model.dit import DitConfig
from model.edm import edm_for
from model.generator import Generator, preset
from model.step import accumulate, draw

DIT = DitConfig(num_frames=4, height_px=12, width_px=16, dim=32, head_dim=16, condition_dim=24, num_blocks=2)


@pytest.fixture(
    params=["fit", "dit", "plus", "upsampler", "short", "fit of another size", "dit of another size"]
)
def case(request, tiny_fit, make_condition):
    """A generator, a batch of two for it, and its description."""
    backbone = DIT if request.param.startswith("dit") else tiny_fit
    size = (16, 12) if "size" in request.param else (12, 16)
    if request.param == "upsampler":
        backbone = replace(backbone, in_channels=6)
    plus = request.param == "plus"
    condition = ConditionConfig(token_dim=24, mode="plus" if plus else "faithful")
    frames = 2 if request.param == "short" else 4
    n = sizes(
        backbone, condition, prompt_tokens=5, num_frames=frames, size_px=size, num_references=2 * plus,
        reference_px=16,
    )  # fmt: skip
    return backbone, condition, n, make_condition(references=2 * plus), (frames, *size)


def test_flops_equal_torch_counter(case) -> None:
    backbone, condition, n, prompts, (frames, *size) = case
    model, edm = Generator(backbone, condition), edm_for(4, 12, 16)
    videos = torch.zeros(2, frames, 3, *size)
    small = 0.5 if model.is_upsampler else None
    draws = draw(edm, videos.shape[1:], seed=0, indices=[0, 1], max_small_level=small)
    z = torch.zeros(2, *model.z_shape) if model.z_shape[0] else None
    # The places of a picture's patches are embedded once for the whole batch.
    once = 2 * 4 * (2 * 64) * backbone.condition_dim if condition.mode == "plus" else 0
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted, torch.no_grad():
        model(videos, draws.sigma, prompts, z, small=draws.small)
    expected = sum(forward_flops(backbone, condition, n, prompt_tokens=5).values())
    assert counted.get_total_flops() == 2 * expected + once
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        accumulate(model, edm, videos, prompts, draws, divisor=2, small_size=(6, 8))
    expected = sum(training_flops(backbone, condition, n, prompt_tokens=5).values())
    passes = 3 if z is not None else 2
    assert counted.get_total_flops() == 2 * expected + passes * once


def test_parameters_are_counted_without_memory(case) -> None:
    backbone, condition, *_ = case
    real = sum(p.numel() for p in Generator(backbone, condition).parameters())
    assert count_parameters(backbone, condition)["total"] == real


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
    estimate = activation_bytes(
        backbone, sizes(backbone, condition, prompt_tokens=20), batch=2, half=half,
        checkpoint=backbone.checkpoint, num_parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    assert estimate == pytest.approx(_peak_bytes(profiler), rel=0.1)


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
    assert "global feed-forward" in page


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
