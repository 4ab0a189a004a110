"""Laws of encoding beforehand: all that can be drawn is there, to the bit, and nothing stale is served."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import DataError
from model.condition import KINDS, EncodedPrompt, Segment
from model.data.batch import ROLES, read_prompt, role_number
from model.data.buckets import Bucket
from model.data.inputs import InputConfig, variants
from model.data.sample import read_sample
from model.encodings.make import RowEncoder
from model.encodings.store import Facts, StoredRow, pack_prompts
from model.prompt.encoder import prompt_key
from model.prompt.load import load_prompt_encoder
from model.prompt.pictures import ReferenceSize, reference_tensors
from model.prompt.select import select
from model.step import draw_dropped, draw_num_documents

RATES = st.dictionaries(st.sampled_from([*KINDS, "all"]), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
DOCUMENTS = st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True)


@given(rates=RATES, documents=DOCUMENTS, seed=st.integers(0, 2**32), index=st.integers(0, 2**40))
def test_whatever_training_draws_is_among_the_variants(
    rates: dict[str, float], documents: list[int], seed: int, index: int
) -> None:
    config = InputConfig(prompts="x", documents=tuple(documents), dropout=rates)
    number = draw_num_documents(config.documents, seed=seed, index=index)
    dropped = draw_dropped(config.dropout, seed=seed, index=index)
    found = variants(config.documents, config.dropout)
    assert (number, dropped) in found
    assert (max(documents), frozenset()) in found and (0, frozenset()) in found
    assert len(found) == len(set(found))


@settings(deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_tokens_come_back_to_the_bit(data: st.DataObject, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dim, pool = 3, dict[str, Tensor]()
    facts = Facts("e", "content", dim, str(dtype).removeprefix("torch."), None, {})
    encoded, prompts = {}, {}
    for number in range(data.draw(st.integers(0, 4))):
        prompt = tuple(
            Segment("text", data.draw(st.sampled_from(list(ROLES))), f"{number} {data.draw(st.integers(0, 3))}")
            for _ in range(data.draw(st.integers(0, 4)))
        )
        places = sorted(data.draw(st.sets(st.sampled_from(range(len(prompt))))) if prompt else [])
        parts = [
            pool.setdefault((prompt[p].text or "")[-1], torch.randn(2, dim, generator=generator))
            for p in places
        ]
        tokens = torch.cat(parts).to(dtype) if parts else torch.zeros(0, dim, dtype=dtype)
        role = torch.tensor([role_number(prompt[p].role) for p in places for _ in range(2)], dtype=torch.long)
        segment = torch.tensor([p for p in places for _ in range(2)], dtype=torch.long)
        key = prompt_key("content", prompt)
        encoded[key], prompts[key] = EncodedPrompt(tokens, role, segment), prompt
    row = StoredRow(facts, {"prompt_id": "a", "status": "ok", **pack_prompts(encoded)})
    for key, prompt in prompts.items():
        assert same(row.prompt(prompt), encoded[key])
    assert row.prompt((Segment("text", "caption", "never encoded"),)) is None


def same(a: EncodedPrompt | None, b: EncodedPrompt) -> bool:
    return a is not None and all(
        x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


MakeConfig = Callable[..., InputConfig]


@pytest.fixture
def make_config(tiny_encoder: dict[str, Any]) -> MakeConfig:
    def make(**changes: Any) -> InputConfig:
        values = {"prompts": "x", "encoder": tiny_encoder, "num_frames": 4, "height_px": 12, "width_px": 16}
        return InputConfig.model_validate(values | {"dropout": {"text": 0.5, "all": 0.1}} | changes)

    return make


def test_stored_variants_equal_fresh_ones_and_share_their_blocks(make_config: MakeConfig, make_row) -> None:
    config = make_config()
    encoder, rows = RowEncoder(config, "cpu"), [make_row(n) for n in range(3)]
    fresh = load_prompt_encoder(config.encoder)
    facts = Facts(**encoder.facts)
    for row, made in zip(rows, encoder(rows), strict=True):
        stored = StoredRow(facts, made)
        stored.check(row["prompt_id"])
        for number, kinds in variants(config.documents, config.dropout):
            prompt = select(read_prompt(row), number, kinds)
            assert same(stored.prompt(prompt), fresh.encode_each([prompt])[0])
        assert len(made["blocks"]) == 3  # document text, document picture, caption: each once
    assert facts.encoder == fresh.identity_hash and facts.encoder_content == fresh.content_hash


def test_a_row_does_not_depend_on_its_company(make_config: MakeConfig, make_row) -> None:
    encoder = RowEncoder(make_config(), "cpu")
    rows = [make_row(n) for n in range(4)]
    assert encoder(rows)[2:3] == encoder(rows[2:3])


def test_a_changed_prompt_or_picture_is_never_served(make_config: MakeConfig, make_row) -> None:
    config, row = make_config(), make_row(0)
    encoder = RowEncoder(config, "cpu")
    stored = StoredRow(Facts(**encoder.facts), encoder([row])[0])
    prompt = read_prompt(row)
    assert stored.prompt(prompt) is not None
    picture = Segment("image", "retrieved", None, (prompt[1].image or b"") + b"\0")
    words = Segment("text", "caption", "another caption")
    for changed in ((prompt[0], picture, prompt[2]), (*prompt[:2], words), prompt[::-1]):
        assert stored.prompt(changed) is None


def test_bad_rows_keep_their_place_and_say_why(make_config: MakeConfig, make_row) -> None:
    rows = [make_row(n) for n in range(3)]
    rows[1]["segments"][1]["image"] = b"not a picture"
    encoder = RowEncoder(make_config(), "cpu")
    made = encoder(rows)
    assert [row["status"] for row in made] == ["ok", "bad_row", "ok"]
    assert "not a readable picture" in made[1]["error"]
    with pytest.raises(DataError, match="not a readable picture"):
        StoredRow(Facts(**encoder.facts), made[1]).check(rows[1]["prompt_id"])
    with pytest.raises(DataError, match="in its place"):
        StoredRow(Facts(**encoder.facts), made[0]).check(rows[2]["prompt_id"])
    assert made[0] == encoder(rows[:1])[0]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_stored_latents_equal_fresh_ones(make_config: MakeConfig, make_row, autoencoders, kind: str) -> None:
    size = {"num_frames": 5, "height_px": 16, "width_px": 24}
    config = make_config(autoencoder=autoencoders[kind], **size)
    encoder = RowEncoder(config, "cpu")
    assert encoder.latents is not None
    bucket = config.shapes[0]
    rows = [make_row(n, num_frames=8, height=16, width=24) for n in range(2)]
    for row, made in zip(rows, encoder(rows), strict=True):
        row = row | {"stored": StoredRow(Facts(**encoder.facts), made)}
        prompt = read_prompt(row)
        sample = read_sample(row, bucket, position=0, prompt=prompt, pixels=False)
        fresh = read_sample(make_copy(row), bucket, position=0, prompt=prompt)
        expected = encoder.latents.encode((fresh.video.float() / 127.5 - 1.0)[None])[0]
        assert sample.latents is not None and sample.latents.equal(expected)
        assert sample.fps == fresh.fps and sample.video.numel() == 0
        with pytest.raises(DataError, match="no latents of this target"):
            read_sample(row, Bucket("video", 4, 16, 24), position=0, prompt=prompt, pixels=False)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_stored_references_equal_fresh_ones_and_others_are_never_served(
    make_config: MakeConfig, make_row, autoencoders, kind: str
) -> None:
    size = {"num_frames": 5, "height_px": 16, "width_px": 24, "reference_size_px": (32, 32)}
    config = make_config(autoencoder=autoencoders[kind], **size)
    encoder, row = RowEncoder(config, "cpu"), make_row(0, num_frames=8, height=16, width=24)
    stored, whole = StoredRow(Facts(**encoder.facts), encoder([row])[0]), read_prompt(row)
    assert len(stored.row["pictures"]) == 1 and encoder.latents is not None
    seen = reference_tensors([whole], config.reference_size, stored.reference)
    pixels = reference_tensors([whole], config.reference_size).pictures[0].float() / 127.5 - 1.0
    assert torch.equal(seen.pictures[0], encoder.latents.encode(pixels[:, None])[:, 0])
    other = replace(whole[1], image=(whole[1].image or b"") + b"\0")
    for segment, at in ((other, config.reference_size), (whole[1], ReferenceSize(16, 16))):
        with pytest.raises(DataError, match="no latents of its retrieved picture"):
            stored.reference(segment, at)
    for changes in ({"references": "faithful"}, {"autoencoder": None}):
        assert RowEncoder(config.model_copy(update=changes), "cpu")([row])[0]["pictures"] == []


def make_copy(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "stored"}


def test_latents_of_a_changed_target_are_never_served(make_config: MakeConfig, make_row, autoencoders) -> None:
    config = make_config(autoencoder=autoencoders["image"])
    encoder, row = RowEncoder(config, "cpu"), make_row(0, num_frames=4, height=12, width=16)
    stored, bucket = StoredRow(Facts(**encoder.facts), encoder([row])[0]), config.shapes[0]
    assert stored.latents(row, bucket) is not None
    other = make_row(1, num_frames=4, height=12, width=16)
    assert stored.latents(other, bucket) is None
    again = replace(stored.facts, autoencoder_content="another")
    assert StoredRow(again, stored.row).latents(row, bucket) is None


def test_an_unreadable_target_is_a_row_with_a_fate(make_config: MakeConfig, make_row, autoencoders) -> None:
    rows = [make_row(n, kind="video", num_frames=4, height=12, width=16) for n in range(2)]
    rows[0]["target"]["data"] = b"not a video"
    made = RowEncoder(make_config(autoencoder=autoencoders["image"]), "cpu")(rows)
    assert [row["status"] for row in made] == ["undecodable", "ok"]
