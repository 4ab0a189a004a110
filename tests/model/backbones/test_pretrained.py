"""Laws of a pretrained backbone as a generator: its text, its clean frames, its adapters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.backbones.folder import read_base
from model.backbones.pretrained import Lora, Pretrained, PretrainedGenerator
from model.backbones.pretrained_inputs import NATIVE_SEGMENT
from model.condition import Condition, ConditionConfig
from model.flow import Flow
from model.prompt.own_text import pack
from model.sample import Denoiser, sample_ode
from tests.model.backbones.tiny_bases import diffusers

FIRST_FRAME, TOKEN_DIM, TEXT_DIM = 5, 16, 20
SHAPE = (2, 3, 4, 6)
"""(t, c, h, w) of the latents."""


@pytest.fixture
def make(wan: str) -> Callable[..., PretrainedGenerator]:
    """A generator on the tiny Wan, in eval mode; fields of `Pretrained` change it."""

    def made(*, mode: str = "plus", **changes: Any) -> PretrainedGenerator:
        base = read_base(wan)
        backbone = Pretrained(
            num_frames=2, height_px=4, width_px=6, in_channels=3, out_channels=3, condition_dim=TEXT_DIM,
            model=wan, family=base.family.transformer, lora=Lora(4, 4, base.family.lora_targets),
            first_frame=FIRST_FRAME,
        )  # fmt: skip
        torch.manual_seed(0)
        return replace(backbone, **changes).own_generator(ConditionConfig(TOKEN_DIM, mode)).eval()  # pyright: ignore

    return made


def make_condition(
    lengths: list[int], native: list[int] | None = None, frames: dict[tuple[int, int], int] | None = None
) -> Condition:
    """Prompts of so many tokens behind so many states of the model's own encoder; (row, place) -> role of clean
    frames.
    """
    g = torch.Generator().manual_seed(0)
    rows = []
    for length, states in zip(lengths, native or [0] * len(lengths), strict=True):
        own = pack(torch.randn(states, TEXT_DIM, generator=g), TOKEN_DIM)
        rows.append((own, torch.randn(length, TOKEN_DIM, generator=g)))
    most = max(len(own) + len(ours) for own, ours in rows)
    tokens, mask = torch.zeros(len(rows), most, TOKEN_DIM), torch.zeros(len(rows), most, dtype=torch.bool)
    segment = torch.zeros(len(rows), most, dtype=torch.long)
    for row, (own, ours) in enumerate(rows):
        tokens[row, : len(own) + len(ours)] = torch.cat([own, ours])
        mask[row, : len(own) + len(ours)] = True
        segment[row, : len(own)] = NATIVE_SEGMENT
    condition = Condition(
        tokens, mask, torch.zeros_like(segment), segment, torch.full((len(rows),), 8.0),
        torch.full((len(rows), 2), 64.0),
    )  # fmt: skip
    if not frames:
        return condition
    count = 1 + max(place for _, place in frames)
    references = torch.zeros(len(rows), count, *SHAPE[1:])
    present, role = (torch.zeros(len(rows), count, dtype=kind) for kind in (torch.bool, torch.long))
    for (row, place), shown_as in frames.items():
        references[row, place] = torch.randn(SHAPE[1:], generator=g)
        present[row, place], role[row, place] = True, shown_as
    given = (role == FIRST_FRAME).any(dim=1)
    return replace(
        condition, references=references, reference_mask=present, reference_role=role,
        reference_place=torch.zeros_like(role), has_first_frame=given if given.any() else None,
    )  # fmt: skip


def noisy(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_step_0_of_append_is_the_base_model_to_the_bit(make, wan: str) -> None:
    """On the states of its own text encoder, padded as its pipeline pads them, whatever our tokens say."""
    base = diffusers.WanTransformer3DModel.from_pretrained(wan, subfolder="transformer").eval()
    condition = make_condition([7, 3], native=[4, 9])
    text = torch.zeros(2, 512, TEXT_DIM)
    for row, states in enumerate((4, 9)):
        rows = condition.tokens[row, : 2 * states].reshape(states, -1)
        text[row, :states] = rows[:, :TEXT_DIM]
    times = torch.tensor([0.3, 0.9])
    x = noisy(2)
    theirs = base(x.transpose(1, 2), 1000 * times, text, return_dict=False)[0].transpose(1, 2)
    model = make(mode="faithful")
    assert torch.equal(model(x, times, condition)[0], theirs)
    model.embedder.gate.fill_(20)
    assert not torch.allclose(model(x, times, condition)[0], theirs, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("text", ["replace", "append"])
def test_a_sample_does_not_depend_on_its_company(make, text: str) -> None:
    """Neither on the length of its neighbour's text, nor on how many references that has."""
    model, x, times = make(text=text), noisy(3), torch.tensor([0.2, 0.5, 0.8])
    if text == "append":
        model.embedder.gate.fill_(20)
    native = [3, 40, 1] if text == "append" else None
    frames = {(0, 0): 2, (1, 0): FIRST_FRAME, (1, 1): 2, (1, 2): 3, (2, 0): 3}
    together = make_condition([5, 60, 2], native, frames)
    whole = model(x, times, together)[0]
    for row in range(3):
        one = together.select(torch.tensor([row]))
        kept = int(one.mask.sum())
        alone = replace(
            one, **{name: getattr(one, name)[:, :kept] for name in ("tokens", "mask", "role", "segment")}
        )
        assert torch.allclose(
            model(x[row : row + 1], times[row : row + 1], alone)[0], whole[row : row + 1], atol=1e-6
        )


@torch.no_grad()
def test_what_references_show_and_say_they_are_changes_the_answer(make) -> None:
    model, x, times = make(text="replace"), noisy(), torch.tensor([0.6])
    plain, shown, first = (
        model(x, times, make_condition([4], None, frames))[0]
        for frames in (None, {(0, 0): 2}, {(0, 0): FIRST_FRAME})
    )
    assert not torch.allclose(plain, shown, atol=1e-4) and not torch.allclose(shown, first, atol=1e-4)


@torch.no_grad()
def test_a_reference_is_marked_by_its_role_and_place_once_they_are_learned(make) -> None:
    """At first neither counts: step 0 is the base model's own answer to a clean frame."""
    model, x, times = make(text="replace"), noisy(), torch.tensor([0.6])
    subject = make_condition([4], None, {(0, 0): 2})
    background = replace(subject, reference_role=torch.full((1, 1), 3))
    second = replace(subject, reference_place=torch.full((1, 1), 4))
    at_first = [model(x, times, one)[0] for one in (subject, background, second)]
    assert torch.equal(at_first[0], at_first[1]) and torch.equal(at_first[0], at_first[2])
    for table in (model.marks.role, model.marks.place):
        table.weight.normal_(generator=torch.Generator().manual_seed(5))
    learned = [model(x, times, one)[0] for one in (subject, background, second)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(learned[one], learned[other], atol=1e-3)


def test_every_mark_has_a_gradient_with_references_or_without(make) -> None:
    model, times = make(text="replace"), torch.tensor([0.6])
    for frames, seen in ((None, False), ({(0, 0): 2}, True)):
        model.zero_grad()
        model(noisy(), times, make_condition([4], None, frames))[0].square().sum().backward()
        assert model.marks.role.weight.grad is not None and model.marks.place.weight.grad is not None
        assert bool(model.marks.role.weight.grad[2].any()) is seen


@torch.no_grad()
def test_sampling_ends_on_the_first_frame_that_is_given(make) -> None:
    """And goes on from it: the frames behind it are others than without it."""
    model, flow = make(text="replace"), Flow(shift=3)
    with_frame, without = (make_condition([4, 4], None, {(0, 0): role, (1, 0): 2}) for role in (FIRST_FRAME, 2))
    first = torch.randn(2, *SHAPE[1:], generator=torch.Generator().manual_seed(3))
    got, other = (
        sample_ode(Denoiser(model, flow, {frozenset(): one}, first=first), flow, noisy(2), num_steps=8)
        for one in (with_frame, without)
    )
    assert torch.allclose(got[0, 0], first[0], atol=1e-4)
    assert not torch.allclose(got[1, 0], first[1], atol=0.1)
    assert not torch.allclose(got[0, 1], other[0, 1], atol=1e-3) and torch.allclose(got[1], other[1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("one_by_one", [False, True])
def test_clean_frames_are_told_time_0_and_videos_of_one_shape_go_together(
    make, monkeypatch: pytest.MonkeyPatch, one_by_one: bool
) -> None:
    """Unless ranks share the model, which call it as often as one another."""
    model, told = make(text="replace", one_by_one=one_by_one), []
    called = type(model.backbone_config.kind).velocity

    def listening(self: Any, transformer: Any, x: Any, times: torch.Tensor, *rest: Any, **more: Any) -> Any:
        told.append(times.tolist())
        return called(self, transformer, x, times, *rest, **more)

    monkeypatch.setattr(type(model.backbone_config.kind), "velocity", listening)
    condition = make_condition([4] * 4, None, {(0, 0): FIRST_FRAME, (0, 1): 2, (1, 0): 3, (3, 0): 2})
    model(noisy(4), torch.tensor([0.25, 0.5, 0.75, 1.0]), condition)
    first, second, none, last = [0.0, 0.25, 0.0], [0.5, 0.5, 0.0], 0.75, [1.0, 1.0, 0.0]
    alone = [[first], [second], [none], [last]]
    assert told == (alone if one_by_one else [[first], [second, last], [none]])


def test_a_tiny_model_learns_one_clip_by_its_adapters_and_without_them_it_has_not(make) -> None:
    """A LoRA without effect is the commonest complaint about LoRAs."""
    targets = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_out")
    model = make(text="native", mode="faithful", lora=Lora(8, 8, targets)).train()
    clip, condition, flow = noisy(), replace(make_condition([4]), tokens=torch.randn(1, 4, TEXT_DIM)), Flow()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    g = torch.Generator().manual_seed(2)

    def loss() -> torch.Tensor:
        eps, t = torch.randn(4, *SHAPE, generator=g), flow.training_sigma(torch.randn(4, generator=g))
        rows = torch.zeros(4, dtype=torch.long)
        x_t = flow.add_noise(clip.expand(4, -1, -1, -1, -1), eps, t)
        return flow.loss(model(x_t, t, condition.select(rows))[0], clip, eps, t).mean()

    losses = []
    for _ in range(240):
        optimizer.zero_grad()
        found = loss()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    with torch.no_grad():
        on = sum(losses[-10:]) / 10
        model.backbone.disable_adapters()
        off = sum(loss().item() for _ in range(10)) / 10
    assert on < 0.5 * off, (losses[0], on, off)


def test_whole_models_train_whole(make) -> None:
    model = make(lora=None, text="native")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_a_base_in_half_has_adapters_in_whole(make) -> None:
    model = make(half_base=True)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["backbone.blocks.0.attn1.to_q.base_layer.weight"] == torch.bfloat16
    assert all(kinds[name] == torch.float32 for name, p in model.named_parameters() if p.requires_grad)
    x, times = noisy(), torch.tensor([0.5])
    with torch.autocast("cpu", torch.bfloat16):
        answer = model(x, times, make_condition([4]))[0]
    assert answer.isfinite().all()
