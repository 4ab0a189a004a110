"""Laws of the cascade: an upsampler trains on large targets, starts from its base, and enlarges its films."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from pydantic import ValidationError

from infra.errors import ConfigError
from infra.storage import read_json
from model.data.shards import open_shards
from model.sampling.generate import run as sample
from model.sampling.plan import SampleConfig
from model.sampling.plan import check as check_sample
from model.training.config import Stage1Config, Stage2Config
from model.training.driver import check
from model.training.loop import Training
from model.training.preflight import prepare_index, read_index
from model.training.state import weights_of

Values = Callable[..., dict[str, Any]]
SMALL, LARGE = {"height_px": 8, "width_px": 8}, {"height_px": 16, "width_px": 16}
FROM_SMALL = {"small_size_px": [8, 8]}


def train(config: Stage1Config, steps: int = 1) -> Training:
    prepare_index(config, open_shards(config.prompts))
    training = Training(config, read_index(config.out))
    for _ in range(steps):
        training.step()
    training.save({})
    training.writer.wait()
    return training


@pytest.fixture
def cascade(stage_values: Values, make_shards, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of a base model of 8 x 8 pixels and of an upsampler to 16 x 16, over the same mp4 shards."""
    shards = str(make_shards(22, kind="video", num_frames=4, height=16, width=16))
    base = stage_values(prompts=shards, out=str(tmp_path / "base"), **SMALL)
    up = stage_values(prompts=shards, out=str(tmp_path / "up"), **LARGE, upsampler=FROM_SMALL)
    return base, up


def test_upsampler_learns_and_resumes_exactly(cascade, tmp_path: Path) -> None:
    values = cascade[1]
    whole = train(Stage1Config.model_validate(values | {"out": str(tmp_path / "whole")}), 3)
    config = Stage1Config.model_validate(values)
    train(config, 1).close()
    parts = train(config, 2)
    assert parts.position == 12
    assert parts.weights_sha256() == whole.weights_sha256()
    assert parts.model.is_upsampler and parts.model.backbone_config.in_channels == 6
    parts.close()
    whole.close()


def test_upsampler_starts_with_the_weights_of_its_base(cascade, tmp_path: Path) -> None:
    base = train(Stage1Config.model_validate(cascade[0]))
    start = FROM_SMALL | {"start_from": base.config.out}
    config = Stage1Config.model_validate(cascade[1] | {"upsampler": start})
    up = train(config, 0)
    mine, theirs = weights_of(up.model), weights_of(base.model)
    same = [name for name in mine if name in theirs and mine[name].shape == theirs[name].shape]
    assert len(same) > 40 and all(mine[name].equal(theirs[name]) for name in same)
    assert mine["model.backbone.embed.weight"][:, : 3 * 16].equal(theirs["model.backbone.embed.weight"])
    up.step()
    up.save({})
    up.close()
    again = train(config, 0)  # a resumed upsampler is itself, not its base
    trained = weights_of(again.model)
    assert again.position == 4 and not all(trained[name].equal(theirs[name]) for name in same)
    again.close()
    base.close()


def test_cascade_makes_large_films_and_the_same_each_time(cascade, tmp_path: Path) -> None:
    base, up = (Stage1Config.model_validate(values) for values in cascade)
    train(base).close()
    train(up).close()
    hashes = set()
    for name, level in (("a", 0.1), ("b", 0.1), ("c", 1.0)):
        options = {"run": up.out, "num_steps": 2, "level": level}
        config = SampleConfig.model_validate(
            {"run": base.out, "out": str(tmp_path / name), "prompts": ["A square."], "fps": 8}
            | {"num_steps": 2, "upsampler": options}
        )
        assert sample(config).num_out == 1
        entry = read_json(f"{config.out}/samples.json")["samples"][0]
        assert entry["upsampler"] == up.out
        hashes.add(entry["frames_sha256"])
    assert len(hashes) == 2
    with av.open(str(tmp_path / "a" / "sample-000.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4


def test_stage_two_of_an_upsampler_is_an_upsampler(cascade, tmp_path: Path) -> None:
    up = train(Stage1Config.model_validate(cascade[1]), 0)
    up.close()
    values = cascade[1] | {"out": str(tmp_path / "two"), "start_from": up.config.out, "tasks": None}
    check(Stage2Config.model_validate(values))
    with pytest.raises(ConfigError, match=r"small_size_px: \(8, 8\) there, None now"):
        check(Stage2Config.model_validate(values | {"upsampler": None}))


def test_validation_of_an_upsampler_is_the_same_each_time(cascade) -> None:
    from model.training.validation.loss import Validation

    config = Stage1Config.model_validate(cascade[1])
    training = train(config)
    validation = Validation(training, read_index(config.out))
    record = validation.run()
    assert record["val/video documents right"] > 0 and record == validation.run()
    training.close()


def test_shards_of_small_frames_are_refused(cascade, make_shards) -> None:
    small = make_shards(8, num_frames=4, height=8, width=8, name="small")
    config = Stage1Config.model_validate(cascade[1] | {"prompts": str(small)})
    with pytest.raises(ConfigError, match=r"holds frames of at most 8 x 8.*target\.kind=video") as caught:
        check(config)
    assert "\n" not in str(caught.value)


def test_upsampler_door(cascade, stage_values: Values) -> None:
    with pytest.raises(ValidationError, match="above the small video's"):
        Stage1Config.model_validate(cascade[1] | SMALL)
    with pytest.raises(ConfigError, match=r"'fit-3.9b-upsampler' is an upsampler"):
        check(Stage1Config.model_validate(cascade[0] | {"preset": "fit-3.9b-upsampler", "backbone": {}}))
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        start = FROM_SMALL | {"start_from": "/nowhere"}
        check(Stage1Config.model_validate(cascade[1] | {"upsampler": start}))


def test_parts_of_a_cascade_that_do_not_meet_are_refused(cascade, tmp_path: Path) -> None:
    base, up = (Stage1Config.model_validate(values) for values in cascade)
    train(base, 0).close()
    train(up, 0).close()
    values = {"run": base.out, "out": str(tmp_path / "out"), "prompts": ["A square."]}

    def refuse(changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            check_sample(SampleConfig.model_validate(values | changes))

    refuse({"run": up.out}, "is an upsampler")
    refuse({"upsampler": {"run": base.out}}, "is no upsampler")
    wide = Stage1Config.model_validate(cascade[0] | {"out": str(tmp_path / "wide"), "width_px": 12})
    train(wide, 0).close()
    refuse({"run": wide.out, "upsampler": {"run": up.out}}, "8 x 12 pixels; legal: .*8 x 8")


def test_noise_of_the_small_video_belongs_to_its_sample(cascade) -> None:
    training = train(Stage1Config.model_validate(cascade[1]), 0)
    batch = next(training.batches)
    x = training.targets(batch)
    draws = training.targets.draw(x, batch.positions)
    assert draws.small is not None and draws.small.level.unique().numel() == len(x)
    again = training.targets.draw(x[1:2], batch.positions[1:2])
    assert again.small is not None
    assert torch.equal(again.small.video, draws.small.video[1:2])
    assert torch.equal(again.small.level, draws.small.level[1:2])
    training.close()
