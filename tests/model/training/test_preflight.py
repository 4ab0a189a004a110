"""Laws of the trainer's preflight: what can't work is refused before Ray starts, in one line with a cure."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.claim import open_job
from infra.errors import ConfigError
from model.training.config import Stage1Config, Stage2Config, StageConfig
from model.training.driver import check, run
from model.training.preflight import inspect
from tests.model.runs import open_training

Values = Callable[..., dict[str, Any]]


def refusal(config: StageConfig) -> str:
    """The one line that the preflight says."""
    with pytest.raises(ConfigError) as caught:
        check(config)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "fit-enormous"}, "preset 'fit-enormous'; legal: "),
        ({"prompts": "/nowhere"}, "no certified prompts at /nowhere"),
        ({"batch_size": 6, "num_workers": 4}, "batch_size 6 is not divisible by 4 workers"),
        ({"batch_size": 64, "num_workers": 64}, "64 workers, but "),
        ({"batch_size": 4, "num_workers": [1, 5]}, "5 workers, but a micro-batch of 4 samples"),
        ({"backbone": {"wings": 2}}, "backbone: "),
        (
            {"parallel": {"mode": "hsdp"}, "num_workers": [1, 2]},
            "parallel.mode hsdp with num_workers [1, 2]; legal: hybrid sharding needs a fixed number",
        ),
    ],
)
def test_preflight_refuses_in_one_line(stage_values: Values, changes: dict[str, Any], message: str) -> None:
    assert message in refusal(Stage1Config.model_validate(stage_values(**changes)))


@pytest.mark.parametrize("workers", [0, [2, 1], [0, 3]])
def test_workers_count_from_one(stage_values: Values, workers: Any) -> None:
    with pytest.raises(ValueError, match="a number from 1, or a range like"):
        Stage1Config.model_validate(stage_values(num_workers=workers))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": ["power-9"]}, r"'power-9'; legal: half-life-<samples>, power-<sigma_rel"),
        ({"trackers": ["mlflow"]}, r"'mlflow'; legal: tensorboard, wandb"),
        ({"optim": {"name": "sgd"}}, r"'sgd'; legal: lamb, adamw, muon"),
        ({"noise": {"sigma_max": 9}}, r"'sigma_max'; legal: sigma_data, log_mean, log_std"),
        ({"noise": {"log_std": 0}}, r"log_std 0.0; legal: above 0"),
    ],
)
def test_names_that_are_not_known_are_refused_with_the_legal_ones(
    stage_values: Values, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Stage1Config.model_validate(stage_values(**changes))


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"model": "nobody/nothing"}, r"127\.0\.0\.1 can't be reached .*; cure: "),
        ({"model": "/no/such/folder"}, r"'/no/such/folder' is no folder, and no name of a repository"),
        (
            {"clip": {"name": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}},
            r"127\.0\.0\.1 can't be reached .*; cure: ",
        ),
    ],
)
def test_a_hub_out_of_reach_is_told_before_ray_starts_and_not_asked_by_a_dry_run(
    stage_values: Values, monkeypatch: pytest.MonkeyPatch, encoder: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    config = Stage1Config.model_validate(stage_values(encoder=encoder))
    assert check(config).startswith("stage1: ")
    with pytest.raises(ConfigError, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)


def test_range_of_workers_is_said_in_words(stage_values: Values) -> None:
    assert Stage1Config.model_validate(stage_values(num_workers="1-3")).num_workers == (1, 3)


def test_missing_logger_is_refused_with_its_extra(stage_values: Values) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    values = stage_values(trackers=["wandb:films"])
    assert "cure: pip install -e '.[wandb]'" in refusal(Stage1Config.model_validate(values))


def test_stored_frames_much_smaller_than_the_videos_are_refused(stage_values: Values) -> None:
    values = stage_values(height_px=36, width_px=48)
    line = refusal(Stage1Config.model_validate(values))
    assert (
        "holds frames of at most 12 x 16 pixels (height x width), the generator learns to make 36 x 48" in line
    )
    assert "cure: make them again with vimi-data augment --set target.kind=video" in line


@pytest.mark.parametrize(
    ("changes", "kind", "note"),
    [
        ({}, "frames", None),
        ({"height_px": 24, "width_px": 32}, "frames", "learns to make 24 x 32: they are enlarged"),
        ({"height_px": 36, "width_px": 48}, "video", "learns to make 36 x 48: they are enlarged"),
        (
            {"num_frames": 8},
            "frames",
            "holds videos of 4 frames, the generator learns to make 8: some are shown",
        ),
    ],
)
def test_targets_a_little_smaller_or_shorter_than_the_videos_are_noted(
    stage_values: Values, make_shards: Any, changes: dict[str, Any], kind: str, note: str | None
) -> None:
    """Sources may be of any size, and are noted alone where none of the first is large enough."""
    prompts = str(make_shards(22, kind=kind, num_frames=4, height=12, width=16))
    plan = check(Stage1Config.model_validate(stage_values(prompts=prompts, **changes)))
    assert ("note: " in plan) == (note is not None) and (note or "") in plan


def test_uncertified_shards_are_refused(stage_values: Values) -> None:
    values = stage_values()
    (Path(values["prompts"]) / "certificate.json").unlink()
    assert "no certified prompts" in refusal(Stage1Config.model_validate(values))


def test_shards_of_another_schema_are_refused(stage_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIMI_TRUST", "1")  # an older writer's, not a damaged file
    values = stage_values()
    for place in Path(values["prompts"]).glob("part-*.parquet"):
        table = pq.read_table(place)
        pq.write_table(table.append_column("surprise", pa.nulls(len(table))).drop(["segments"]), place)
    line = refusal(Stage1Config.model_validate(values))
    assert "segments" in line and "cure: make them again with vimi-data augment" in line


def test_folder_of_another_run_is_refused_with_the_fields_that_differ(stage_values: Values) -> None:
    config = Stage1Config.model_validate(stage_values())
    claim(config)
    claim(config.model_copy(update={"num_workers": 2, "log_every_samples": 9}))  # how fast, not what
    other = config.model_copy(update={"seed": 1, "batch_size": 8})
    with pytest.raises(ConfigError, match=r"\(config.batch_size: 4 there, 8 now; config.seed: 0 there"):
        claim(other)


def claim(config: StageConfig) -> None:
    open_job(config.out, job="stage1", config=config, inputs=inspect(config).inputs, portable=True)


def test_moved_run_and_moved_shards_go_on(stage_values: Values, tmp_path: Path) -> None:
    values = stage_values()
    config = Stage1Config.model_validate(values)
    claim(config)
    training = open_training(config)
    training.step()
    training.save({})
    training.close()
    moved = {"out": str(tmp_path / "elsewhere" / "run"), "prompts": str(tmp_path / "elsewhere" / "shards")}
    for name, place in moved.items():
        shutil.move(values[name], place)
    config = Stage1Config.model_validate(values | moved)
    claim(config)
    again = open_training(config)
    assert again.position == 4
    again.step()
    again.close()


def test_stage_two_preflight_refuses_missing_and_foreign_checkpoints(
    stage_values: Values, tmp_path: Path
) -> None:
    values = stage_values(start_from=str(tmp_path / "none"), out=str(tmp_path / "two"))
    assert "no committed checkpoint" in refusal(Stage2Config.model_validate(values))
    training = open_training(Stage1Config.model_validate(stage_values(prompts=values["prompts"])))
    training.save({})
    training.close()
    values |= {"start_from": training.config.out, "height_px": 16}
    assert "height_px: 12 there, 16 now" in refusal(Stage2Config.model_validate(values))
