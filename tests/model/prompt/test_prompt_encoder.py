"""Encoded prompts are remembered by content: one is found if and only if nothing has changed."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.condition import EncodedPrompt, Prompt, Segment
from model.data.batch import ROLES, role_number
from model.prompt.encoder import PromptEncoder, RememberingEncoder, prompt_key

SEGMENT = st.builds(
    Segment,
    type=st.sampled_from(["text", "image"]),
    role=st.sampled_from(list(ROLES)),
    text=st.none() | st.text(max_size=5),
    image=st.none() | st.binary(max_size=5),
)
PROMPT = st.lists(SEGMENT, max_size=4).map(tuple)


class HashEncoder(PromptEncoder):
    """A whole encoder of its own: tokens are the bytes of a hash of what it was given."""

    dim = 8
    dtype = torch.float32

    def __init__(self, name: str = "a") -> None:
        self.name = name
        self.num_encoded = 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    @property
    def arithmetic(self) -> dict[str, Any]:
        return {}

    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        self.num_encoded += len(prompts)
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        rows = [sha256(f"{self.name} {n} {prompt}".encode()).digest()[:8] for n in range(len(prompt))]
        tokens = torch.tensor([list(row) for row in rows], dtype=torch.float32).reshape(-1, 8)
        role = torch.tensor([role_number(s.role) for s in prompt], dtype=torch.long)
        return EncodedPrompt(tokens, role, torch.arange(len(prompt)))


def same(a: EncodedPrompt, b: EncodedPrompt) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def caption(words: str) -> Prompt:
    return (Segment("text", "caption", text=words), Segment("image", "subject", "dog", b"123"))


@given(first=PROMPT, second=PROMPT)
def test_keys_are_equal_only_for_equal_prompts(first: Prompt, second: Prompt) -> None:
    assert (prompt_key("e", first) == prompt_key("e", second)) == (first == second)
    assert prompt_key("e", first) != prompt_key("f", first)


@given(prompt=PROMPT.filter(bool), data=st.data())
def test_a_mutated_prompt_is_never_served_as_the_other(prompt: Prompt, data: st.DataObject) -> None:
    """Every mutation of text, picture, role, type or order gets tokens of its own."""
    encoder = HashEncoder()
    cached = RememberingEncoder(encoder)
    cached.encode_each([prompt])
    place = data.draw(st.integers(0, len(prompt) - 1))
    other = data.draw(SEGMENT)
    field = data.draw(st.sampled_from(["type", "role", "text", "image"]))
    changed = replace(prompt[place], **{field: getattr(other, field)})
    mutated = data.draw(
        st.sampled_from(
            [(*prompt[:place], changed, *prompt[place + 1 :]), prompt[::-1], prompt[:-1], (*prompt, other)]
        )
    )
    found = cached.encode_each([mutated, prompt])
    assert same(found[0], HashEncoder().encode_each([mutated])[0])
    assert same(found[1], HashEncoder().encode_each([prompt])[0])
    assert encoder.num_encoded == 1 + (mutated != prompt)


def test_memory_holds_the_most_recent_up_to_its_limit() -> None:
    one = HashEncoder().encode_each([caption("0")])[0].num_bytes
    encoder = HashEncoder()
    cached = RememberingEncoder(encoder, 3 * one)
    for words in "abc":
        cached.encode_each([caption(words)])
    cached.encode_each([caption("a")])  # now b is the oldest
    cached.encode_each([caption("d")])
    assert encoder.num_encoded == 4
    cached.encode_each([caption("a"), caption("c"), caption("d")])
    assert encoder.num_encoded == 4
    cached.encode_each([caption("b")])
    assert encoder.num_encoded == 5


def test_equal_prompts_of_one_batch_are_encoded_once_in_place() -> None:
    encoder = HashEncoder()
    cached = RememberingEncoder(encoder, 0)
    batch = cached.encode([caption("x"), (), caption("y"), caption("x")])
    assert encoder.num_encoded == 3
    assert batch.mask.sum(1).tolist() == [2, 0, 2, 2]
    torch.testing.assert_close(batch.tokens[0], batch.tokens[3])
    assert not torch.equal(batch.tokens[0], batch.tokens[2])
