"""LAMB, Muon and schedules: against their definitions, and sharded as whole."""

# pyright: reportPrivateImportUsage=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

import os
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing as mp
from torch import nn
from torch.optim import Optimizer

from model.backbones.fit import FitConfig
from model.condition import Condition, ConditionConfig
from model.edm import edm_for
from model.ema import Ema, HalfLife, PowerFunction
from model.generator import Generator
from model.optim import Lamb, adamw, cosine_factor, lamb, muon, orthogonalized, parameter_groups
from model.step import accumulate, draw
from tests.model.small_model import small_model, train_small

SHARDED_FIT = FitConfig(
    num_frames=4, height_px=12, width_px=16, group_height=3, group_width=2, patch_dim=32,
    patch_head_dim=16, num_latents=8, latent_dim=48, latent_head_dim=16, condition_dim=32,
    num_blocks=2, layers_per_block=1, checkpoint=True,
)  # fmt: skip


def test_lamb_follows_algorithm_2_by_hand() -> None:
    p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = Lamb([p], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01)
    m = v = torch.zeros(1, 2)
    expected = p.detach().clone()
    for t in (1, 2):
        g = torch.tensor([[0.5, -1.0 * t]])
        p.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        r = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-6) + 0.01 * expected
        expected = expected - 0.1 * expected.norm() / r.norm() * r
        torch.testing.assert_close(p.detach(), expected)


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-3, 1e3))
def test_lamb_moves_a_tensor_by_lr_of_its_norm_at_any_gradient_scale(scale: float) -> None:
    p = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    before = p.detach().clone()
    p.grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)) * scale
    Lamb([p], lr=0.02).step()
    moved = (p.detach() - before).norm() / before.norm()
    assert moved.item() == pytest.approx(0.02, rel=1e-3)


def test_lamb_starts_a_zero_tensor() -> None:
    p = nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.ones(3, 3)
    Lamb([p], lr=0.1).step()
    assert p.isfinite().all()
    assert (p < 0).all()


@pytest.mark.parametrize("build", [lamb, adamw, muon])
def test_optimizers_learn(build) -> None:
    model = small_model()
    losses = train_small(model, build(model, lr=0.02), 60)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("build", [lamb, adamw, muon])
def test_resumed_optimizer_equals_unbroken_one(build) -> None:
    unbroken = small_model()
    optimizer = build(unbroken, lr=0.02)
    train_small(unbroken, optimizer, 6)
    first = small_model()
    before = build(first, lr=0.02)
    train_small(first, before, 3)
    second = small_model(seed=1)
    second.load_state_dict(first.state_dict())
    after = build(second, lr=0.5)
    after.load_state_dict(before.state_dict())
    train_small(second, after, 3)
    for a, b in zip(unbroken.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_orthogonalized_keeps_the_directions_and_levels_their_lengths(m: int, n: int, seed: int) -> None:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    got = orthogonalized(x)
    u, lengths, vt = torch.linalg.svd(x, full_matrices=False)
    core = u.T @ got @ vt.T
    torch.testing.assert_close(core, core.diagonal().diag(), atol=2e-2, rtol=0)
    clear = core.diagonal()[lengths > 0.05 * lengths[0]]
    assert (clear > 0.6).all() and (clear < 1.3).all()
    torch.testing.assert_close(orthogonalized(x.T), got.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(orthogonalized(torch.stack([x, 100 * x]))[1], got, atol=1e-3, rtol=1e-3)


def test_muon_turns_hidden_matrices_by_a_size_like_adamws() -> None:
    """The update's root mean square is 0.2 times the rate, whatever the gradient's; the rest is AdamW."""
    model = Generator(SHARDED_FIT, ConditionConfig(token_dim=24))
    optimizer = muon(model, lr=0.01, weight_decay=0.0)
    hidden = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in hidden}
    assert names == {n for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for scale, p in enumerate(model.parameters(), start=1):
        p.grad = 1e-3 * scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(scale))
    optimizer.step()
    for name, p in model.named_parameters():
        rms = (p - before[name]).square().mean().sqrt().item()
        assert rms == pytest.approx(0.01 * (0.2 if name in names else 1.0), rel=0.2), name


def test_norms_biases_and_tables_are_not_decayed(make_generator) -> None:
    model = make_generator(shaken=False)
    decayed, plain = parameter_groups(model, 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    spared = {names[id(p)] for p in plain["params"]}
    assert {"backbone.latents", "backbone.time", "embedder.role.weight"} <= spared
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_cosine_warms_up_then_falls_to_nothing() -> None:
    factors = [cosine_factor(s, 10, 110) for s in range(120)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == factors[119] == 0
    assert all(a >= b for a, b in pairwise(factors[10:]))


def _steps(model: Generator, build: Callable[..., Optimizer]) -> dict[str, torch.Tensor]:
    """Four steps of an optimizer with both averages; every resulting tensor by name."""
    edm, shape = edm_for(4, 12, 16), (4, 3, 12, 16)
    optimizer = build(model, lr=0.02)
    averages = [Ema(model, HalfLife(20)), Ema(model, PowerFunction(0.1))]
    zeros = torch.zeros(2, 5, dtype=torch.long)
    condition = Condition(
        tokens=torch.ones(2, 5, 24), mask=zeros == 0, role=zeros, segment=zeros,
        fps=torch.full((2,), 6.0), original_size_px=torch.full((2, 2), 64),
    )  # fmt: skip
    for step in range(4):
        draws = draw(edm, shape, seed=0, indices=[2 * step, 2 * step + 1])
        accumulate(model, edm, torch.zeros(2, *shape), condition, draws, divisor=2)
        optimizer.step()
        optimizer.zero_grad()
        for ema in averages:
            ema.update(model, 2 * step + 2)
    found = dict(model.named_parameters())
    for i, ema in enumerate(averages):
        found |= {f"{i}.{n}": w for n, w in ema.weights.items()}
    return {n: v.detach() for n, v in found.items()}


def _small_generator() -> Generator:
    torch.manual_seed(0)
    return Generator(SHARDED_FIT, ConditionConfig(token_dim=24))


def _sharded(rank: int, world: int, port: int, out: str) -> None:
    """One rank of FSDP2 runs, one for each optimizer, each block a unit; all ranks see the same batch."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    runs = {}
    for build in (lamb, muon):
        model = _small_generator()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = _steps(model, build)
        runs[build.__name__] = {n: v.full_tensor() for n, v in found.items() if isinstance(v, DTensor)}
        assert len(runs[build.__name__]) == len(found), "an average lost its sharding"
    if rank == 0:
        torch.save(runs, out)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, free_port: int) -> dict[str, dict[str, torch.Tensor]]:
    """What two ranks made of each optimizer; started once."""
    out = tmp_path_factory.mktemp("sharded") / "runs.pt"
    mp.spawn(_sharded, args=(2, free_port, str(out)), nprocs=2)
    return torch.load(out)


@pytest.mark.parametrize("build", [lamb, muon])
def test_sharded_training_equals_whole_training(
    sharded: dict[str, dict[str, torch.Tensor]], build: Callable[..., Optimizer]
) -> None:
    """FSDP2 on 2 ranks: the step, LAMB's trust ratios or Muon's whole matrices, and both averages."""
    whole = _steps(_small_generator(), build)
    found = sharded[build.__name__]
    assert found.keys() == whole.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
