"""A given first frame stands in its video as it is, in training and in sampling, through any backbone."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from model.backbones.base import BackboneConfig
from model.backbones.dit import DitConfig
from model.condition import Condition
from model.data.batch import read_prompt
from model.edm import edm_for
from model.flow import Flow
from model.generator import Generator
from model.guidance import FULL, NOTHING, Guidance
from model.objective import Objective
from model.sample import Denoiser, sample_ode
from model.sampling.generate import run as sample
from model.sampling.plan import SampleConfig
from model.step import draw, losses
from model.training.config import Stage1Config
from tests.model.conftest import TINY_FIT
from tests.model.prompt_tables import jpeg, moving_square
from tests.model.runs import advance, fingerprint, open_training, unbroken

DIT = DitConfig(
    num_frames=4, height_px=12, width_px=16, dim=32, head_dim=16, condition_dim=32, num_blocks=2, pixel_dim=4
)
SHAPE = (4, 3, 12, 16)
EDM = edm_for(4, 12, 16)
BACKBONES = pytest.mark.parametrize("backbone", [TINY_FIT, DIT], ids=["fit", "dit"])
OBJECTIVES = pytest.mark.parametrize("objective", [EDM, Flow()], ids=["edm", "flow"])
GIVEN = torch.tensor([True, False, True, False])


def random_videos(seed: int, count: int = 4) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def setting(make_generator, make_condition) -> Callable[[BackboneConfig], tuple[Generator, Condition]]:
    """A shaken generator that sees references, and four conditions of which two give the first frame."""

    def make(backbone: BackboneConfig) -> tuple[Generator, Condition]:
        condition = replace(make_condition(batch=4), has_first_frame=GIVEN)
        return make_generator(backbone, mode="plus"), condition

    return make


@BACKBONES
@OBJECTIVES
def test_a_given_frame_has_no_noise_and_no_loss(
    setting, backbone: BackboneConfig, objective: Objective
) -> None:
    model, condition = setting(backbone)
    videos, draws = random_videos(1), draw(objective, SHAPE, seed=0, indices=range(4), self_condition_rate=0.5)
    other = draws.eps.clone()
    other[:, 0] = 7.0
    one, two = (
        losses(model, objective, videos, condition, replace(draws, eps=eps)) for eps in (draws.eps, other)
    )
    assert (one == two).tolist() == GIVEN.tolist()
    changed = videos.clone()
    changed[:, 0] = -videos[:, 0]
    moved = losses(model, objective, changed, condition, draws)
    assert (moved != one).all()  # it goes into the later frames


@BACKBONES
def test_a_given_frame_is_a_samples_own_affair(setting, backbone: BackboneConfig) -> None:
    model, condition = setting(backbone)
    videos, draws = random_videos(1), draw(EDM, SHAPE, seed=0, indices=range(4), self_condition_rate=0)
    together = losses(model, EDM, videos, condition, draws)
    none = losses(model, EDM, videos, replace(condition, has_first_frame=None), draws)
    assert torch.equal(together[~GIVEN], none[~GIVEN]) and (together != none)[GIVEN].all()


def test_a_lone_frame_is_never_given(setting) -> None:
    model, condition = setting(TINY_FIT)
    draws = draw(EDM, (1, *SHAPE[1:]), seed=0, indices=range(4), self_condition_rate=0)
    loss = losses(model, EDM, random_videos(1)[:, :1], condition, draws)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@BACKBONES
@OBJECTIVES
def test_sampling_begins_with_the_given_frame_under_guidance_without_it(
    setting, backbone: BackboneConfig, objective: Objective
) -> None:
    model, condition = setting(backbone)
    nothing = replace(condition, mask=torch.zeros_like(condition.mask), has_first_frame=None)
    first, noise = random_videos(2)[:, 0], torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))

    def film(frames: torch.Tensor) -> torch.Tensor:
        guidance = Guidance("cfg", weight=3.0, threshold=0.9)
        branches = {FULL: condition, NOTHING: nothing}
        denoiser = Denoiser(model, objective, branches, guidance, first=frames)
        return sample_ode(denoiser, objective, noise, num_steps=4)

    one, other = film(first), film(-first)
    assert min(psnr(a, b) for a, b in zip(one[GIVEN, 0], first[GIVEN], strict=True)) > 80
    assert max(psnr(a, b) for a, b in zip(one[~GIVEN, 0], first[~GIVEN], strict=True)) < 20
    assert (one[GIVEN, 1:] - other[GIVEN, 1:]).abs().mean() > 1e-4  # the others go on from it
    assert torch.equal(one[~GIVEN], other[~GIVEN])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of tensors in [-1, 1], dB."""
    return 10 * math.log10(4 / max(float((a - b).square().mean()), 1e-12))


def prediction_rows(make_row, count: int, **size: int) -> list[dict[str, Any]]:
    """Rows of video prediction: caption, then the target's first frame."""
    rows = [make_row(n, task="video_prediction", **size) for n in range(count)]
    for number, row in enumerate(rows):
        frame = jpeg(moving_square(number, **size)[0])
        row["segments"] = [row["segments"][-1], {**row["segments"][1], "role": "first_frame", "image": frame}]
    return rows


@pytest.fixture
def prediction_values(stage_values, make_shards, make_row) -> dict[str, Any]:
    rows = prediction_rows(make_row, 22, num_frames=4, height=12, width=16)
    return stage_values(
        prompts=str(make_shards(rows=rows, name="prediction")), dropout={"frame": 0.3, "all": 0.1}
    )


def test_plus_gives_the_first_frame_that_dropout_leaves_and_faithful_none(
    prediction_values: dict[str, Any], tmp_path: Path
) -> None:
    for mode in ("plus", "faithful"):
        values = prediction_values | {"references": mode, "out": str(tmp_path / mode)}
        training = open_training(Stage1Config.model_validate(values))
        found = []
        for _ in range(10):
            batch = next(training.batches)
            condition = training.condition(batch.prompts, batch.fps, batch.original_size_px)
            given = condition.has_first_frame
            there = [any(s.role == "first_frame" for s in prompt) for prompt in batch.prompts]
            assert mode == "faithful" or there == (given.tolist() if given is not None else [False] * 4)
            found += [False] * 4 if given is None else given.tolist()
        assert 20 < sum(found) < 36 if mode == "plus" else not any(found)
        training.close()


def test_resumed_training_with_first_frames_equals_unbroken(
    prediction_values: dict[str, Any], tmp_path: Path
) -> None:
    whole, parts = (
        Stage1Config.model_validate(prediction_values | {"out": str(tmp_path / name)}) for name in ("a", "b")
    )
    for steps in (1, 2):
        training = open_training(parts)
        advance(training, steps)
        training.save({})
        found = fingerprint(training)
        training.close()
    assert found == unbroken(whole, 3)


@pytest.mark.parametrize("space", ["pixels", "image", "video"])
def test_a_sampled_video_begins_with_the_picture_of_its_prompt(
    stage_values, make_shards, make_row, autoencoders, tmp_path: Path, space: str
) -> None:
    """In latents as well as the autoencoder can; `video` is causal: its first frame has a latent of its own."""
    size = {"num_frames": 5, "height": 16, "width": 24}
    rows = prediction_rows(make_row, 8, **size)
    values = stage_values(prompts=str(make_shards(rows=rows, name="prediction")))
    values |= {"num_frames": 5, "height_px": 16, "width_px": 24, "autoencoder": autoencoders.get(space)}
    if space != "pixels":
        values["backbone"] = {**values["backbone"], "patch_px": 1}
    config = Stage1Config.model_validate(values)
    training = open_training(config)
    training.save({})
    latents = training.targets.latents
    training.close()
    out = tmp_path / "samples"
    made = SampleConfig(
        run=config.out, out=str(out), prompts_uri=values["prompts"], rows=1, num_steps=2, batch_size=1
    )
    assert sample(made).num_out == 1
    with av.open(str(out / "sample-000.mp4")) as container:
        shown = next(container.decode(video=0)).to_ndarray(format="rgb24")
    shown = np.asarray(Image.fromarray(shown).resize((24, 16), Image.Resampling.BOX), np.float32)
    picture = next(s.image for s in read_prompt(rows[0]) if s.image)
    target = torch.from_numpy(moving_square(0, **size)[:1]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert picture is not None
    if latents is not None:
        target = latents.decode(latents.encode(target[None]), 1)[0]
    assert psnr(torch.from_numpy(shown).permute(2, 0, 1) / 127.5 - 1, target[0]) > 25
