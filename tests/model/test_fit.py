"""FIT's laws: table 8's numbers, groups as reshapes, self-conditioning, dropout, recomputation."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.backbones.fit import Fit, FitBlock, FitConfig
from model.backbones.presets import preset
from model.condition import ConditionConfig
from model.edm import edm_for
from model.generator import Generator
from model.layers import dropout_scale, layer_seed
from model.step import accumulate, draw


def _inputs(config: FitConfig, batch: int = 2, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    size = (config.num_frames, config.in_channels, config.height_px, config.width_px)
    x = torch.randn(batch, *size, generator=g)
    tokens = torch.randn(batch, 6, config.condition_dim, generator=g)
    mask = torch.arange(6) < torch.tensor([[6], [4], [5], [3]])[:batch]
    return x, tokens, mask


@pytest.fixture
def fit(make_generator, tiny_fit) -> Fit:
    return make_generator(tiny_fit).backbone


@pytest.mark.parametrize(
    ("name", "billions"), [("fit-500m", 0.491), ("fit-3.9b", 3.905), ("fit-3.9b-upsampler", 3.905)]
)
def test_presets_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    with torch.device("meta"):
        generator = Generator(preset(name), ConditionConfig(token_dim=1024))
    count = sum(p.numel() for p in generator.parameters())
    assert round(count / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("name", "groups", "per_frame", "latents", "size"),
    [
        ("fit-500m", 8, 20, 64, (40, 64)),
        ("fit-3.9b", 8, 20, 96, (40, 64)),
        ("fit-3.9b-upsampler", 32, 288, 24, (288, 512)),
    ],
)
def test_layout_is_table_8(name, groups, per_frame, latents, size) -> None:
    config = preset(name)
    assert isinstance(config, FitConfig)
    a = config.layout
    assert (a.num_groups, a.patches_per_frame, a.latents_per_group) == (groups, per_frame, latents)
    assert (a.height_px, a.width_px) == size


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(5, 40), st.integers(5, 40), st.sampled_from([1, 2, 4]))
def test_cutting_and_joining_is_the_identity(frames: int, height: int, width: int, patch: int):
    rows, columns = (max(1, round(-(-side // patch) / 4)) for side in (height, width))
    config = FitConfig(
        num_frames=4, height_px=height, width_px=width, patch_px=patch, group_height=4,
        group_width=4, patch_dim=8, patch_head_dim=4, num_latents=rows * columns, latent_dim=8,
        latent_head_dim=4, condition_dim=8, num_blocks=1,
    )  # fmt: skip
    a = config.layout
    fit = Fit(config)
    x = torch.randn(2, frames, 3, height, width)
    cut = fit._cut(x, a)
    assert cut.shape == (2, a.num_groups, frames * a.patches_per_frame, 3 * patch**2)
    assert torch.equal(fit._join(cut, a, frames, height, width), x)


def test_groups_meet_only_in_the_global_layers(tiny_fit) -> None:
    torch.manual_seed(0)
    block = FitBlock(replace(tiny_fit, layers_per_block=0))
    x, z = torch.randn(1, 2, 24, 32), torch.randn(1, 8, 48)
    _, tokens, mask = _inputs(tiny_fit, batch=1)
    before, _ = block(x, z, tokens, mask[:, None, None], None)
    x[:, 1] += 1
    after, _ = block(x, z, tokens, mask[:, None, None], None)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_every_frame_and_group_hears_of_every_other(fit, tiny_fit) -> None:
    x, tokens, mask = _inputs(tiny_fit, batch=1)
    x.requires_grad_()
    fit(x, tokens, mask)[0][0, 0, :, :4, :4].sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=2) > 0).all()


def test_hidden_condition_tokens_change_nothing(fit, tiny_fit) -> None:
    x, tokens, mask = _inputs(tiny_fit)
    other = torch.where(mask[..., None], tokens, 100.0)
    torch.testing.assert_close(fit(x, tokens, mask)[0], fit(x, other, mask)[0])


def test_no_earlier_latents_equal_zero_latents(fit, tiny_fit) -> None:
    x, tokens, mask = _inputs(tiny_fit)
    without = fit(x, tokens, mask, None)[0]
    zeros = fit(x, tokens, mask, torch.zeros(2, *fit.z_shape))[0]
    assert torch.equal(without, zeros)


def test_self_conditioning_starts_switched_off(tiny_fit) -> None:
    fit = Fit(tiny_fit)
    torch.nn.init.normal_(fit.head.weight)
    x, tokens, mask = _inputs(tiny_fit)
    noisy = fit(x, tokens, mask, torch.randn(2, *fit.z_shape))[0]
    assert torch.equal(noisy, fit(x, tokens, mask)[0])


def test_samples_of_a_batch_are_strangers(fit, tiny_fit) -> None:
    x, tokens, mask = _inputs(tiny_fit, batch=4)
    z, keys = torch.randn(4, *fit.z_shape), torch.tensor([3, 1, 4, 1])
    together = fit(x, tokens, mask, z, keys)[0]
    for i in range(4):
        one = slice(i, i + 1)
        alone = fit(x[one], tokens[one], mask[one], z[one], keys[one])[0]
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-5)


def test_every_parameter_is_trained(fit, tiny_fit) -> None:
    """Above all those of the last block, which reach the output through its write alone."""
    x, tokens, mask = _inputs(tiny_fit)
    fit(x, tokens, mask, torch.randn(2, *fit.z_shape))[0].square().mean().backward()
    idle = [n for n, p in fit.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert idle == []


def test_recomputing_gives_the_same_gradients(make_generator, tiny_fit) -> None:
    x, tokens, mask = _inputs(tiny_fit)
    keys = torch.tensor([1, 2])
    grads = []
    for recompute in (False, True):
        config = replace(tiny_fit, checkpoint=recompute, dropout=0.3)
        fit = make_generator(config).backbone
        fit(x, tokens, mask, None, keys)[0].square().mean().backward()
        grads.append([p.grad for p in fit.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_blocks_compile_without_a_graph_break(fit, tiny_fit) -> None:
    """Both with and without dropout; the eager backend traces, and does not wait for a compiler."""
    a = tiny_fit.layout
    x = torch.randn(2, a.num_groups, 4 * a.patches_per_frame, 32)
    z, (_, tokens, mask) = torch.randn(2, 8, 48), _inputs(tiny_fit)
    block = torch.compile(fit.blocks[0], fullgraph=True, backend="eager")
    for keys in (None, torch.tensor([1, 2])):
        expected = fit.blocks[0](x, z, tokens, mask[:, None, None], keys)
        torch.testing.assert_close(block(x, z, tokens, mask[:, None, None], keys), expected)


def test_compiled_blocks_share_one_graph(make_generator, tiny_fit) -> None:
    """Nothing in a block is a constant of its own, so the compiler is asked once and not once a block."""
    graphs = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(inputs))
        return graph

    model = make_generator(replace(tiny_fit, dropout=0.3, num_blocks=4))
    model.compile_blocks(fullgraph=True, backend=note)
    x, tokens, mask = _inputs(tiny_fit)
    model.backbone(x, tokens, mask, None, torch.tensor([1, 2]))
    assert len(graphs) == 1


def test_dropout_is_a_function_of_the_sample_and_the_layer() -> None:
    keys = torch.tensor([5, 6, 5])
    scale = dropout_scale(keys, layer_seed(0), torch.Size((3, 40, 50)), 0.1)
    assert torch.equal(scale[0], scale[2])
    assert not torch.equal(scale[0], scale[1])
    assert not torch.equal(scale[0], dropout_scale(keys, layer_seed(1), torch.Size((3, 40, 50)), 0.1)[0])
    assert scale.unique().tolist() == pytest.approx([0, 1 / 0.9])


def test_dropout_drops_at_its_rate_without_a_pattern() -> None:
    scale = dropout_scale(torch.arange(64), layer_seed(7), torch.Size((64, 64, 64)), 0.1)
    dropped = (scale == 0).double()
    assert dropped.mean().item() == pytest.approx(0.1, abs=0.003)
    for dim in (1, 2):
        assert dropped.mean(dim=(0, dim)).std().item() < 0.01
    flat = dropped.flatten(1) - 0.1
    assert abs((flat[:, :-1] * flat[:, 1:]).mean().item()) < 0.001
    assert abs((flat[:-1] * flat[1:]).mean().item()) < 0.001


def test_shorter_clips_and_pictures_fit(fit, tiny_fit) -> None:
    x, tokens, mask = _inputs(tiny_fit)
    assert fit(x[:, :1], tokens, mask)[0].shape == (2, 1, 3, 12, 16)


def test_odd_sizes_are_padded_with_zeros_and_cropped_again(tiny_fit) -> None:
    config = replace(tiny_fit, height_px=9, width_px=15)
    fit = Fit(config)
    x, tokens, mask = _inputs(config)
    assert fit(x, tokens, mask)[0].shape == x.shape
    whole = fit._join(fit._cut(x, config.layout), config.layout, x.shape[1], 12, 16)
    assert torch.equal(whole[..., :9, :15], x)
    assert not whole[..., 9:, :].any() and not whole[..., 15:].any()


def test_too_many_frames_are_refused(fit, tiny_fit) -> None:
    x, tokens, mask = _inputs(tiny_fit)
    with pytest.raises(ValueError, match="up to 4"):
        fit(torch.cat([x, x], dim=1), tokens, mask)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(4, 40), width=st.integers(4, 40), frames=st.integers(1, 4))
def test_other_sizes_keep_their_groups_and_lose_no_pixel(
    tiny_fit, height: int, width: int, frames: int
) -> None:
    fit = Fit(tiny_fit)
    a = tiny_fit.layout_at(height, width)
    assert (a.num_groups, a.num_latents) == (tiny_fit.layout.num_groups, tiny_fit.layout.num_latents)
    assert a.height_px >= height and a.width_px >= width
    x = torch.randn(1, frames, 3, height, width)
    assert torch.equal(fit._join(fit._cut(x, a), a, frames, height, width), x)


def test_places_of_another_size_span_the_same_picture(fit, tiny_fit) -> None:
    """A table that says how far down and across a patch is, says it truly for twice and half the size."""
    depth, breadth = (torch.arange(n) + 0.5 for n in (3, 4))
    with torch.no_grad():
        fit.time.zero_()
        fit.row.copy_((depth / 3)[:, None].expand_as(fit.row))
        fit.column.copy_(4 * (breadth / 4)[:, None].expand_as(fit.column))
    for height, width in ((24, 32), (12, 16), (16, 12)):
        a = tiny_fit.layout_at(height, width)
        places = fit._places(a, 1, height, width)[..., 0]
        sums = places.reshape(a.rows, a.columns, a.group_height, a.group_width).permute(0, 2, 1, 3).flatten(2)
        sums = sums.flatten(0, 1)[: height // 4, : width // 4]
        rows, columns = (torch.arange(n // 4) + 0.5 for n in (height, width))
        true = rows[:, None] / len(rows) + 4 * columns / len(columns)
        inside = (slice(1, -1), slice(1, -1))  # beyond the outermost old centres the table has nothing to say
        torch.testing.assert_close(sums[inside], true[inside])


def test_other_sizes_train_the_tables_of_places(fit, tiny_fit) -> None:
    _, tokens, mask = _inputs(tiny_fit)
    out, _ = fit(torch.randn(2, 4, 3, 16, 12), tokens, mask)
    out.square().mean().backward()
    assert fit.row.grad.abs().any() and fit.column.grad.abs().any()


def test_latents_are_rounded_up_to_whole_groups(tiny_fit) -> None:
    assert Fit(replace(tiny_fit, num_latents=9)).z_shape == (10, 48)


def test_bf16_answer_is_close_to_float32(fit, tiny_fit) -> None:
    x, tokens, mask = _inputs(tiny_fit)
    exact = fit(x, tokens, mask)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = fit(x, tokens, mask)[0]
    assert rough.dtype == torch.bfloat16
    assert ((rough - exact).norm() / exact.norm()).item() < 0.03


def test_half_streams_are_half_and_their_answer_is_close(make_generator, tiny_fit) -> None:
    exact, rough = (make_generator(replace(tiny_fit, half_streams=half)).backbone for half in (False, True))
    rough.load_state_dict(exact.state_dict())
    x, tokens, mask = _inputs(tiny_fit)
    with torch.autocast("cpu", torch.bfloat16):
        (a, z_exact), (b, z_rough) = exact(x, tokens, mask), rough(x, tokens, mask)
    assert (z_exact.dtype, z_rough.dtype) == (torch.float32, torch.bfloat16)
    assert ((a - b).norm() / a.norm()).item() < 0.03
    torch.testing.assert_close(rough(x, tokens, mask)[0], exact(x, tokens, mask)[0])  # without autocast


@pytest.mark.slow
def test_compiled_model_learns_as_the_eager_one(make_generator, make_condition, tiny_fit) -> None:
    """The real compiler, with recomputation and dropout: equal losses and gradients."""
    edm, videos = edm_for(4, 12, 16), torch.rand(2, 4, 3, 12, 16) * 2 - 1
    draws = draw(edm, videos.shape[1:], seed=0, indices=[0, 1])
    found = []
    for compiled in (False, True):
        model = make_generator(replace(tiny_fit, dropout=0.2, checkpoint=True))
        if compiled:
            model.compile_blocks(fullgraph=True)
        each = accumulate(model, edm, videos, make_condition(), draws, divisor=2)
        found.append([each, *(p.grad for p in model.parameters())])
    for eager, quick in zip(*found, strict=True):
        torch.testing.assert_close(eager, quick, rtol=1e-3, atol=1e-4)
