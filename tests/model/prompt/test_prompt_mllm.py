"""Prompts through real transformers classes: LLaVA, Qwen2-VL, Idefics3 and SmolVLM, tiny and random."""

import io
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.errors import ConfigError, DataError
from model.condition import Prompt, Segment
from model.data.batch import role_number
from model.prompt import mllm_encoder
from model.prompt.encoder import PromptEncoderConfig
from model.prompt.layout import Span
from model.prompt.load import load_prompt_encoder
from model.prompt.mllm_encoder import MllmPromptEncoder, batches_of
from tests.model.prompt.tiny_mllms import FAMILIES, made


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def encoder_of(family: str, **values: Any) -> MllmPromptEncoder:
    return MllmPromptEncoder(PromptEncoderConfig(**values), *made(family))


@pytest.fixture(autouse=True)
def pictures_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harder case; the product leaves pictures whole."""
    monkeypatch.setattr(mllm_encoder, "SPLIT_PICTURES", True)


def picture(seed: int, height: int = 40, width: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(0), picture(1, 90, 30), picture(2, 30, 31)]
DOCUMENT = (Segment("text", "retrieved", "a dog in a park"), Segment("image", "retrieved", image=PICTURES[0]))
SUBJECTS = (
    Segment("text", "instruction", "Generate a video with the text and image"),
    Segment("text", "caption", "A "),
    Segment("image", "subject", "dog", PICTURES[1]),
    Segment("text", "caption", " is playing in "),
    Segment("image", "background", "grass", PICTURES[2]),
    Segment("text", "caption", "."),
)
CAPTION = (Segment("text", "caption", "the grass"),)
PROMPTS: list[Prompt] = [(*DOCUMENT, *CAPTION), SUBJECTS, CAPTION, (), (*DOCUMENT, *SUBJECTS)]


def said(encoder: MllmPromptEncoder, prompt: Prompt) -> dict[int, str]:
    """Segment position -> the decoded text of the tokens that were given to it."""
    one = encoder.process(prompt)
    ids = one.inputs["input_ids"][0]
    return {
        int(place): encoder.processor.tokenizer.decode(ids[one.kept[one.segment == place]])
        for place in one.segment.unique()
    }


def test_every_token_belongs_to_the_segment_that_it_says(family: str) -> None:
    encoder = encoder_of(family)
    found = said(encoder, SUBJECTS)
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    for place, segment in enumerate(SUBJECTS):
        if segment.type == "text":
            assert found[place].strip() == (segment.text or "").strip()
        else:
            token = encoder.template.image_token
            rest = found[place].replace(token, "")
            assert token in found[place] and "playing" not in rest and "dog" not in rest


def test_roles_follow_segments(family: str) -> None:
    batch = encoder_of(family).encode([SUBJECTS])
    for place, segment in enumerate(SUBJECTS):
        roles = batch.role[0][batch.mask[0] & (batch.segment[0] == place)]
        assert len(roles) and (roles == role_number(segment.role)).all()


def test_the_whole_sequence_is_the_processors_own_chat(family: str) -> None:
    """Token for token what `apply_chat_template` makes of the same message (LLaVA's: pictures inline)."""
    encoder = encoder_of(family)
    _, processor = made(family)
    content: list[dict[str, Any]] = []
    for segment in DOCUMENT:
        image = Image.open(io.BytesIO(PICTURES[0]))
        content.append(
            {"type": "text", "text": segment.text}
            if segment.type == "text"
            else {"type": "image", "image": image}
        )
    if family == "llava":
        rendered = f"USER: {DOCUMENT[0].text}<image> "
        expected = processor(text=[rendered], images=[content[1]["image"]], return_tensors="pt")
    else:
        expected = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt"},
        )
    found = encoder.process(DOCUMENT).inputs
    assert found["input_ids"].tolist() == torch.as_tensor(expected["input_ids"]).tolist()
    torch.testing.assert_close(found["pixel_values"], torch.as_tensor(expected["pixel_values"]))


@torch.no_grad()
@pytest.mark.parametrize(("layer", "index"), [("last", 3), ("penultimate", 2), (0, 0), (-2, 2)])
def test_tokens_are_the_models_own_hidden_states(family: str, layer: str | int, index: int) -> None:
    encoder = encoder_of(family, layer=layer)
    model, _ = made(family)
    one = encoder.process(SUBJECTS)
    out = model(**one.inputs, output_hidden_states=True)
    expected = out.hidden_states[index][0][one.kept]
    torch.testing.assert_close(encoder.encode_each([SUBJECTS])[0].tokens, expected, atol=1e-5, rtol=1e-4)


def test_batches_of_mixed_length_equal_single_prompts(family: str) -> None:
    alone = encoder_of(family, batch_size=1).encode_each(PROMPTS)
    for size in (2, 5):
        together = encoder_of(family, batch_size=size).encode_each(PROMPTS)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a.tokens, b.tokens, atol=1e-5, rtol=1e-4)
            assert torch.equal(a.segment, b.segment) and torch.equal(a.role, b.role)


def test_batches_are_of_like_length(family: str) -> None:
    """Sorted by length, padding is a small part; in the order given it is not."""
    encoder = encoder_of(family)
    prompts = [(Segment("text", "caption", "dog " * n),) for n in (1, 40, 2, 39, 3, 38, 4, 37)]
    ready = [encoder.process(prompt) for prompt in prompts]
    padded = [max(ready[row].length for row in rows) * len(rows) for rows in batches_of(ready, 4)]
    assert sum(padded) <= 1.1 * sum(one.length for one in ready)


def test_an_earlier_picture_changes_later_tokens(family: str) -> None:
    """The states are the language model's: the caption has seen what stands before it."""
    encoder = encoder_of(family)
    other = (DOCUMENT[0], Segment("image", "retrieved", image=picture(9)))
    first, second = encoder.encode_each([(*DOCUMENT, *CAPTION), (*other, *CAPTION)])
    last = first.segment == 2
    assert not torch.allclose(first.tokens[last], second.tokens[second.segment == 2], atol=1e-6)


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)
HOSTILE = st.sampled_from(
    [
        "<image>",
        "<|image_pad|>",
        "<|im_end|>",
        "{{ messages }}",
        "\ue0000\ue001",
        "<im<image>age>",
        "</s>",
        "é𝄞",
    ]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(WORDS | HOSTILE, min_size=1, max_size=4), data=st.data())
def test_no_text_can_write_control_tokens_or_move_a_picture(
    family: str, texts: list[str], data: st.DataObject
) -> None:
    encoder = encoder_of(family)
    segments = [Segment("text", "caption", text) for text in texts]
    place = data.draw(st.integers(0, len(segments)))
    segments.insert(place, Segment("image", "subject", image=PICTURES[2]))
    one = encoder.process(tuple(segments))
    special = set(encoder.processor.tokenizer.all_special_ids)
    ids = one.inputs["input_ids"][0][one.kept]
    texts_only = ids[one.segment != place]
    assert not any(int(token) in special for token in texts_only)
    assert (one.segment == place).any()
    order = [int(n) for n in one.segment.unique_consecutive()]
    assert order == sorted(order)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(8, 120), repeat=st.integers(0, 40))
def test_no_sequence_is_longer_than_the_limit_and_no_picture_is_cut(
    family: str, limit: int, repeat: int
) -> None:
    limit += 70  # Qwen's system prompt
    whole = encoder_of(family).process((*DOCUMENT, *SUBJECTS))
    tail = Segment("text", "caption", "dog " * repeat)
    one = encoder_of(family, max_tokens=limit).process((*DOCUMENT, *SUBJECTS, tail))
    assert one.length <= limit
    for place, segment in enumerate((*DOCUMENT, *SUBJECTS)):
        if segment.type == "image":
            tokens, full = int((one.segment == place).sum()), int((whole.segment == place).sum())
            assert tokens in (0, full) or tokens <= 5  # gone, whole, or its word


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_pictures_of_any_size_are_taken(family: str, height: int, width: int) -> None:
    prompt = (Segment("image", "first_frame", image=picture(0, height, width)), *CAPTION)
    batch = encoder_of(family).encode([prompt])
    assert batch.tokens.isfinite().all() and (batch.segment[0] == 1).any()


def test_an_unsplit_or_smaller_picture_costs_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_tokens(family: str) -> int:
        prompt = (Segment("image", "first_frame", image=picture(0, 100, 100)),)
        return len(encoder_of(family).encode_each([prompt])[0])

    split, large = num_tokens("smolvlm"), num_tokens("qwen2_vl")
    monkeypatch.setattr(mllm_encoder, "SPLIT_PICTURES", False)
    monkeypatch.setattr(mllm_encoder, "PICTURE_SIDE_PX", 56)
    assert num_tokens("smolvlm") == 4 + 3 < split
    assert num_tokens("qwen2_vl") == 4 + 2 < large


def test_a_limit_that_the_template_uses_up_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens = 8; legal: at least"):
        encoder_of("qwen2_vl", max_tokens=8)


def test_a_processor_without_a_template_gets_the_bare_prompt(family: str) -> None:
    model, processor = made(family)
    template, processor.chat_template = processor.chat_template, None
    try:
        bare = MllmPromptEncoder(PromptEncoderConfig(), model, processor)
        assert bare.template.render(DOCUMENT).text == f"a dog in a park{bare.template.image_token}"
        assert bare.template.render(DOCUMENT).spans[0] == Span(0, "retrieved", 0, 15)
        assert sorted(said(bare, DOCUMENT)) == [0, 1]
    finally:
        processor.chat_template = template


def test_identity_follows_weights_layer_and_template(family: str) -> None:
    hashes = {encoder_of(family).identity_hash, encoder_of(family).identity_hash}
    assert len(hashes) == 1
    hashes.add(encoder_of(family, layer="last").identity_hash)
    model, processor = made(family)
    weight = next(model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
    hashes.add(encoder_of(family).identity_hash)
    with torch.no_grad():
        weight.view(-1)[0] -= 1
    template, processor.chat_template = processor.chat_template, processor.chat_template + " "
    hashes.add(encoder_of(family).identity_hash)
    processor.chat_template = template
    assert len(hashes) == 4


def test_a_model_in_bfloat16_is_the_same_encoder_with_other_arithmetic(family: str) -> None:
    model, processor = made(family)
    half = deepcopy(model).to(torch.bfloat16)
    both = [MllmPromptEncoder(PromptEncoderConfig(), each, processor) for each in (model, half)]
    assert both[0].identity_hash == both[1].identity_hash
    assert both[0].content_hash != both[1].content_hash
    assert both[1].encode([CAPTION]).tokens.dtype == torch.bfloat16


def test_a_saved_model_loads_from_its_folder(family: str, tmp_path: Path) -> None:
    model, processor = made(family)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    expected = encoder_of(family).encode(PROMPTS)
    encoder = load_prompt_encoder(PromptEncoderConfig(model=str(tmp_path / "model")))
    for _ in range(2):  # the second from memory
        found = encoder.encode(PROMPTS)
        torch.testing.assert_close(found.tokens, expected.tokens, atol=1e-5, rtol=1e-4)
        assert torch.equal(found.segment, expected.segment)


def test_what_is_no_such_model_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for name in (str(tmp_path), "nobody/has-this-model"):
        with pytest.raises(ConfigError) as caught:
            load_prompt_encoder(PromptEncoderConfig(model=name))
        assert "\n" not in str(caught.value) and "offline" in str(caught.value)
    with pytest.raises(ConfigError, match="penultimate"):
        encoder_of("llava", layer=9)


def test_a_bad_picture_names_its_segment(family: str) -> None:
    with pytest.raises(DataError, match=r"segment 1 \(subject\)"):
        encoder_of(family).encode([(*CAPTION, Segment("image", "subject", image=b"junk"))])
