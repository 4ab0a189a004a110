"""The baseline takes and returns what FIT does."""

from dataclasses import replace

import pytest
import torch

from model.backbones.dit import Dit, DitConfig

CONFIG = DitConfig(num_frames=4, height_px=10, width_px=16, dim=32, head_dim=16, condition_dim=24, num_blocks=2)


def _inputs(batch: int = 2):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, 3, 10, 16, generator=g)
    return x, torch.randn(batch, 6, 24, generator=g), torch.ones(batch, 6, dtype=torch.bool)


@pytest.fixture(params=[0, 4], ids=["plain", "with a pixel head"])
def dit(make_generator, request) -> Dit:
    return make_generator(replace(CONFIG, pixel_dim=request.param)).backbone


def test_answer_has_the_shape_of_the_video_and_carries_no_latents(dit) -> None:
    x, tokens, mask = _inputs()
    f, z = dit(x, tokens, mask)
    assert f.shape == x.shape
    assert z.shape == (2, *dit.z_shape) and not z.numel()


def test_cutting_and_joining_is_the_identity(dit) -> None:
    x, _, _ = _inputs()
    assert torch.equal(dit._join(dit._cut(x), 4, 10, 16), x)


@pytest.mark.parametrize("pixel_dim", [0, 4])
def test_a_fresh_model_answers_zero(pixel_dim) -> None:
    f, _ = Dit(replace(CONFIG, pixel_dim=pixel_dim))(*_inputs())
    assert not f.any()


def test_the_pixel_head_sees_across_the_edges_of_patches(make_generator) -> None:
    """One pixel's noise reaches the answer of its neighbour in the next patch, and no attention carries it."""
    dit = make_generator(replace(CONFIG, pixel_dim=4, num_blocks=0)).backbone
    x, tokens, mask = _inputs()
    moved = x.clone()
    moved[:, :, :, 3, 3] += 1
    change = (dit(moved, tokens, mask)[0] - dit(x, tokens, mask)[0]).abs()
    assert (change[:, :, :, 4, 4] > 0).any() and not change[:, :, :, 9, 15].any()


def test_every_parameter_is_trained(dit) -> None:
    dit(*_inputs())[0].square().mean().backward()
    assert [n for n, p in dit.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_hidden_condition_tokens_change_nothing(dit) -> None:
    x, tokens, mask = _inputs()
    mask[:, 4:] = False
    other = torch.where(mask[..., None], tokens, 100.0)
    torch.testing.assert_close(dit(x, tokens, mask)[0], dit(x, other, mask)[0])


def test_blocks_compile_without_a_graph_break(dit) -> None:
    _, tokens, mask = _inputs()
    patches, modulation = torch.randn(2, 48, 32), torch.randn(2, 6, 32)
    block = torch.compile(dit.blocks[0], fullgraph=True, backend="eager")
    args = (patches, modulation, tokens, mask[:, None, None])
    torch.testing.assert_close(block(*args), dit.blocks[0](*args))


def test_too_many_frames_are_refused_and_other_sizes_answered(dit) -> None:
    x, tokens, mask = _inputs()
    with pytest.raises(ValueError, match="up to 4"):
        dit(torch.cat([x, x], dim=1), tokens, mask)
    for height, width in ((10, 9), (24, 16), (3, 3)):
        video = torch.randn(2, 3, 3, height, width)
        assert dit(video, tokens, mask)[0].shape == video.shape
