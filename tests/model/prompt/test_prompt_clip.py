"""Prompts through a CLIP: text and patch tokens interleaved as the segments are."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.clip import OFFLINE_TOKENS, ClipConfig, load_clip
from infra.errors import DataError
from model.condition import Prompt, Segment
from model.data.batch import role_number
from model.prompt.clip_encoder import ClipPromptEncoder
from model.prompt.encoder import PromptEncoderConfig
from model.prompt.load import load_prompt_encoder

OFFLINE = ClipConfig(name="offline", precision="fp32")


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(seed) for seed in range(3)]
DOCUMENT = (Segment("text", "retrieved", "a dog in a park"), Segment("image", "retrieved", image=PICTURES[0]))
CAPTION = (Segment("text", "caption", "a white dog runs on grass"),)
SUBJECT = (Segment("text", "caption", "A"), Segment("image", "subject", "dog", PICTURES[1]))
PROMPTS: list[Prompt] = [(*DOCUMENT, *CAPTION), CAPTION, (), (*DOCUMENT, *SUBJECT)]


def config(**values: object) -> PromptEncoderConfig:
    base = {"clip": OFFLINE, "patch_grid": 4}
    return PromptEncoderConfig.model_validate({**base, **values})


@pytest.fixture(scope="module")
def encoder() -> ClipPromptEncoder:
    made = load_prompt_encoder(config(), remember=False)
    assert isinstance(made, ClipPromptEncoder)
    return made


def test_tokens_are_the_segments_own_in_order(encoder: ClipPromptEncoder) -> None:
    batch = encoder.encode(PROMPTS)
    states, mask = encoder.clip.text_tokens(["a dog in a park"])
    words = int(mask.sum())
    assert batch.segment[0, batch.mask[0]].tolist()[: words + 17] == [0] * words + [1] * 16 + [2]
    assert batch.role[0, words + 16] == role_number("caption")
    torch.testing.assert_close(batch.tokens[0, :words], states[0][mask[0]])
    assert batch.mask.sum(1).tolist()[2] == 0
    assert not batch.tokens[~batch.mask].any()


def test_a_batch_of_one_gives_the_same_bits_whatever_the_company(encoder: ClipPromptEncoder) -> None:
    together = encoder.encode_each(PROMPTS)
    alone = [encoder.encode_each([prompt])[0] for prompt in PROMPTS]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(together, alone, strict=True))


def test_tokens_can_be_trained_upon(encoder: ClipPromptEncoder) -> None:
    tokens = encoder.encode(PROMPTS).tokens
    head = torch.nn.Linear(encoder.dim, 1)
    head(tokens).sum().backward()
    assert head.weight.grad is not None and not tokens.requires_grad


@settings(max_examples=8, deadline=None)
@given(
    prompt=st.lists(
        st.sampled_from([*DOCUMENT, *CAPTION, *SUBJECT, Segment("text", "caption", "  ")]), max_size=6
    ),
    limit=st.integers(8, 60),
)
def test_no_prompt_is_longer_than_the_limit(
    encoder: ClipPromptEncoder, prompt: list[Segment], limit: int
) -> None:
    short = ClipPromptEncoder(config(max_tokens=limit), encoder.clip)
    encoded = short.encode_each([tuple(prompt)])[0]
    assert len(encoded) <= limit
    for place, segment in enumerate(prompt):
        if segment.type == "image":
            words = encoder.clip.tokenize([segment.text])[1].item() if segment.text else 0
            assert (encoded.segment == place).sum() in (0, 16, words)


def test_a_bad_picture_is_refused(encoder: ClipPromptEncoder) -> None:
    prompt = (*CAPTION, Segment("image", "subject", image=b"junk"))
    with pytest.raises(DataError, match=r"segment 1 \(subject\)"):
        encoder.encode([prompt])


def test_an_unknown_role_is_refused(encoder: ClipPromptEncoder) -> None:
    with pytest.raises(DataError, match="legal: caption"):
        encoder.encode([(Segment("text", "title", "x"),)])


@pytest.mark.parametrize("change", [{"max_tokens": 99}, {"patch_grid": 2}])
def test_identity_follows_what_changes_the_tokens(
    encoder: ClipPromptEncoder, change: dict[str, object]
) -> None:
    assert ClipPromptEncoder(config(**change), encoder.clip).identity_hash != encoder.identity_hash
    assert ClipPromptEncoder(config(), encoder.clip).content_hash == encoder.content_hash


def test_identity_holds_the_version_of_the_offline_tokens(encoder: ClipPromptEncoder) -> None:
    version = {"picture_tokens": OFFLINE_TOKENS}
    assert version.items() <= encoder.identity.items() and version.items() <= encoder.config.identity().items()
    for other in ({"clip": {"name": "ViT-B-32"}}, {"clip": None}):
        assert "picture_tokens" not in config(**other).identity()


def test_arithmetic_changes_what_is_cached_but_not_who_the_encoder_is(encoder: ClipPromptEncoder) -> None:
    half = load_clip(ClipConfig(name="offline", precision="bf16"))
    other = ClipPromptEncoder(config(), half)
    assert other.identity_hash == encoder.identity_hash
    assert other.content_hash != encoder.content_hash


def test_a_condition_carries_what_the_generator_reads(encoder: ClipPromptEncoder) -> None:
    condition = encoder.condition(
        PROMPTS, fps=torch.full((4,), 6.0), original_size_px=torch.tensor([[288.0, 512.0]] * 4)
    )
    assert condition.tokens.shape[0] == len(condition) == 4 and condition.tokens.shape[2] == encoder.dim
