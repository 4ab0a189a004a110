"""What each family of pretrained transformers owes beside its stock samples: clean frames, text, training."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.backbones.families import FAMILIES
from model.backbones.family import Scale
from model.backbones.folder import read_base
from model.backbones.pretrained import Lora, Pretrained, PretrainedGenerator
from model.condition import Condition, ConditionConfig, Segment
from model.flow import Flow
from model.prompt.own_text import load_own_text
from tests.model.backbones.tiny_bases import SAVERS, WORDS, save_ltx, save_skyreels

TEXT_DIM, FRAMES, HEIGHT, WIDTH = 20, 3, 4, 6


def test_every_family_is_held_to_these_laws() -> None:
    assert SAVERS.keys() == FAMILIES.keys()


def make(folder: str, **changes: Any) -> PretrainedGenerator:
    base = read_base(folder)
    channels = base.family.sizes(base.transformer).channels
    backbone = Pretrained(
        num_frames=FRAMES, height_px=HEIGHT, width_px=WIDTH, in_channels=channels, out_channels=channels,
        condition_dim=TEXT_DIM, model=folder, family=base.family.transformer, text="native", scale=Scale(8, 4),
        lora=Lora(4, 4, base.family.lora_targets), first_frame=5,
    )  # fmt: skip
    torch.manual_seed(0)
    return PretrainedGenerator(replace(backbone, **changes), ConditionConfig(TEXT_DIM, "plus")).eval()


def latents(model: PretrainedGenerator, batch: int = 1) -> torch.Tensor:
    shape = (batch, FRAMES, model.backbone_config.in_channels, HEIGHT, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def condition(lengths: list[int], **more: Any) -> Condition:
    most, batch = max(lengths), len(lengths)
    mask = torch.arange(most) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(batch, most, TEXT_DIM, generator=torch.Generator().manual_seed(2)) * mask[..., None]
    zeros = torch.zeros(batch, most, dtype=torch.long)
    return Condition(tokens, mask, zeros, zeros, torch.full((batch,), 16.0), torch.ones(batch, 2), **more)


@torch.no_grad()
def test_company_changes_nothing_and_clean_frames_do(folder: str) -> None:
    model = make(folder)
    x, t = latents(model, 2), torch.tensor([0.3, 0.7])
    shape = (2, 1, *x.shape[2:])
    of = {
        "references": torch.randn(shape, generator=torch.Generator().manual_seed(3)),
        "reference_mask": torch.tensor([[False], [True]]),
        "reference_role": torch.tensor([[0], [2]]),
        "reference_place": torch.zeros(2, 1, dtype=torch.long),
    }
    both = model(x, t, condition([3, 7], **of))[0]
    alone = condition([3, 7]).select(torch.tensor([0]))
    assert torch.allclose(model(x[:1], t[:1], alone)[0], both[:1], atol=1e-6)
    plain = model(x, t, condition([3, 7]))[0]
    assert torch.allclose(plain[0], both[0], atol=1e-6) and not torch.allclose(plain[1], both[1], atol=1e-5)
    given = model(x, t, condition([3, 7], has_first_frame=torch.tensor([True, False])))[0]
    assert not torch.allclose(given[0], plain[0], atol=1e-5) and torch.allclose(given[1], plain[1], atol=1e-6)


@torch.no_grad()
def test_company_changes_nothing_where_frame_rates_are_told(tmp_path: Path) -> None:
    """SkyReels' models of 540p and more: diffusers adds the rates to the times of one video alone."""
    model = make(save_skyreels(tmp_path / "base", inject_sample_info=True))
    x, t, fps = latents(model, 2), torch.tensor([0.3, 0.7]), torch.tensor([16.0, 24.0])
    given = torch.tensor([True, True])
    both = replace(condition([5, 5], has_first_frame=given), fps=fps)
    answers = model(x, t, both)[0]
    for n in range(2):
        alone = model(x[n : n + 1], t[n : n + 1], both.select(torch.tensor([n])))[0]
        assert torch.allclose(alone, answers[n : n + 1], atol=1e-6)
    assert not torch.allclose(model(x, t, replace(both, fps=fps.flip(0)))[0], answers, atol=1e-5)


def test_adapters_learn(folder: str) -> None:
    model, flow = make(folder).train(), Flow()
    x, prompt, t = latents(model), condition([5]), torch.tensor([0.5])
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = flow.loss(model(flow.add_noise(x, eps, t), t, prompt)[0], x, eps, t).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and trained[0].grad is not None


@torch.no_grad()
def test_captions_are_encoded_alone_to_their_own_length(folder: str) -> None:
    encoder = load_own_text(folder)
    prompts = [(Segment("text", "caption", text=" ".join(WORDS[:n])),) for n in (2, 6, 0)]
    each = encoder.encode_each(prompts)
    assert [len(one) for one in each] == [3, 7, 1]  # and the end
    assert torch.equal(encoder.encode_each(prompts[1:2])[0].tokens, each[1].tokens)
    assert each[0].tokens.shape[1] == TEXT_DIM == encoder.dim


@torch.no_grad()
def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_read(tmp_path: Path) -> None:
    """As LTX-Video's repository holds it."""
    import sentencepiece

    folder = save_ltx(tmp_path / "base")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a dog runs"] * 20), model_writer=written, vocab_size=len(WORDS) + 3,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    place = tmp_path / "base/tokenizer"
    (place / "tokenizer.json").unlink()
    (place / "spiece.model").write_bytes(written.getvalue())
    values = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (place / "tokenizer_config.json").write_text(json.dumps({**values, "extra_ids": 0}))
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5Tokenizer"]
    (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    encoded = load_own_text(folder).encode_each([(Segment("text", "caption", text="a dog runs"),)])[0]
    assert len(encoded) > 1 and encoded.tokens.isfinite().all()
