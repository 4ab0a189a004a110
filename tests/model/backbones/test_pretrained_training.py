"""Trainings that start from a pretrained model: what they train, keep, resume and refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.run_folder import RunFolder
from model.condition import Segment
from model.prompt.pictures import decode_as_it_is
from model.sampling.maker import GuidanceConfig, open_maker
from model.sampling.requests import SampleRequest
from model.training.checkpoint import tensors_in
from model.training.config import Stage1Config
from model.training.state import restore_generator
from tests.model.prompt_tables import prompt_row
from tests.model.runs import (
    advance,
    alone,
    fingerprint,
    on_ranks,
    open_training,
    relative_distance,
    unbroken,
    weights_at,
)

Values = Callable[..., dict[str, Any]]


def config_of(values: dict[str, Any]) -> Stage1Config:
    return Stage1Config.model_validate(values)


@pytest.mark.parametrize("text", ["replace", "append", "native"])
def test_only_adapters_and_projection_are_trained_and_kept(base_values: Values, text: str) -> None:
    config = config_of(base_values(text=text))
    training = open_training(config)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    advance(training, 2)
    training.save({})
    training.close()
    moved = {name for name, p in training.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name or name.startswith(("embedder.", "marks.")) for name in moved)
    assert any("lora_A" in name for name in moved)
    assert any(name.startswith("embedder.") for name in moved) == (text != "native")
    kept = {
        name
        for name in tensors_in(RunFolder(config.out).latest_checkpoint() or "")
        if name.startswith("model.")
    }
    trained = {f"model.{name}" for name, p in training.model.named_parameters() if p.requires_grad}
    assert kept == trained


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(base_values: Values, tmp_path: Path) -> None:
    values = base_values(samples=12)
    expected = unbroken(config_of(values), 4)
    config = config_of({**values, "out": str(tmp_path / "broken")})
    first = open_training(config)
    advance(first, 2)
    first.save({})
    first.close()
    second = open_training(config)
    assert second.position == 4
    advance(second, 2)
    assert fingerprint(second) == expected
    second.close()


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("fsdp", {"text": "append"}),
        *(
            pytest.param(mode, changes, marks=pytest.mark.slow)
            for mode, changes in (("fsdp", {"lora": None}), ("fsdp", {"text": "replace"}), ("ddp", {}))
        ),
    ],
)
def test_ranks_that_share_a_base_end_like_one(
    base_values: Values, tmp_path: Path, mode: str, changes: dict[str, Any]
) -> None:
    """Adapters and the frozen base in shards (`lora: null`: all is trained), and one rank goes on from them."""
    values = base_values(batch_size=4, samples=24, parallel={"mode": mode}, **changes)
    ids, expected = alone({**values, "out": str(tmp_path / "one")}, 3)
    many = on_ranks(2, {**values, "out": str(tmp_path / "two")}, tmp_path / "two.json", 3)
    assert many["ids"] == ids
    assert relative_distance(weights_at(str(tmp_path / "two")), expected) < 1e-6
    again = open_training(config_of({**values, "out": str(tmp_path / "two")}))
    assert (again.position, again.weights_sha256()) == (12, many["sha"])
    advance(again, 1)
    again.close()


def test_a_sampled_video_begins_with_the_frame_that_its_prompt_gives(base_values: Values) -> None:
    """As its autoencoder shows that frame, 20 dB nearer than another: a random one tells them little apart."""
    config = config_of(base_values(text="replace"))
    training = open_training(config)
    advance(training, 1)
    training.save({})
    training.close()
    maker = open_maker(restore_generator(config.out, device=torch.device("cpu")), GuidanceConfig(weight=2.0))
    rows = [prompt_row(number, num_frames=5, height=32, width=48) for number in (0, 1)]
    pictures = [row["segments"][1]["image"] for row in rows]
    frames = [
        torch.from_numpy(np.array(decode_as_it_is(data))).permute(2, 0, 1) / 127.5 - 1 for data in pictures
    ]
    text = Segment("text", "caption", text="a red square moves")
    prompt = (text, Segment("image", "first_frame", image=pictures[0]))
    assert maker.latents is not None
    made = maker.films([SampleRequest(prompt, 8.0, (32, 48))], num_steps=4)[0, 0]
    shown, other = (maker.latents.decode(maker.latents.encode(frame[None, None]))[0, 0] for frame in frames)
    assert psnr(made, shown) > 20 + psnr(shown, other)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of pixels in [-1, 1], dB."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))
