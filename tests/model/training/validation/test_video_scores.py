"""Metrics of sampled videos while training: the same each time, for each task, and nothing is disturbed."""

from collections.abc import Callable
from typing import Any

import pytest

from infra.errors import ConfigError
from model.data.shards import open_shards
from model.training.config import Stage1Config, Stage2Config
from model.training.driver import Looks
from model.training.loop import Training
from model.training.metrics import MetricsLog, grouped
from model.training.preflight import check_metrics, inspect, prepare_index, read_index
from model.training.report import Reporter
from model.training.stop_signals import StopSignals
from model.training.validation.video_scores import VideoScores

Values = Callable[..., dict[str, Any]]


def scored(encoder: dict[str, Any], *metrics: str) -> dict[str, Any]:
    """Of `validation`, for a run of four frames."""
    networks = {"clip": encoder["clip"]}
    return {"num_samples": 0, "metrics": metrics, "metrics_videos": 6, "networks": networks}


def open_run(config: Stage1Config) -> Training:
    prepare_index(config, open_shards(config.prompts))
    return Training(config, read_index(config.out))


def test_scores_are_the_same_each_time_and_disturb_nothing(
    stage_values: Values, tiny_encoder: dict[str, Any], short_previews: None
) -> None:
    config = Stage1Config.model_validate(stage_values(validation=scored(tiny_encoder, "flicker", "clip_t")))
    training = open_run(config)
    scores = VideoScores(training, read_index(config.out))
    before = training.weights_sha256()
    first = scores.score()
    assert first == scores.score() == VideoScores(training, read_index(config.out)).score()
    assert set(first) == {f"score/{m} n6{end}" for m in ("flicker", "clip_t") for end in ("", " low", " high")}
    assert first["score/flicker n6 low"] <= first["score/flicker n6"] <= first["score/flicker n6 high"] <= 1
    training.step()
    assert scores.score() != first and training.weights_sha256() != before
    training.close()


def test_stage_2_has_scores_of_each_task(
    stage_values: Values, tiny_encoder: dict[str, Any], make_shards: Any, make_row: Any, short_previews: None
) -> None:
    tasks = ("subject_driven", "text_to_video")
    rows = [make_row(n, task=tasks[n % 2], num_frames=4, height=12, width=16) for n in range(12)]
    prompts = str(make_shards(rows=rows, name="tasks", job="instruct"))
    values = stage_values(prompts=prompts, validation=scored(tiny_encoder, "frozen"))
    tasks_of = dict.fromkeys(tasks, 1.0)
    config = Stage2Config.model_validate(values | {"start_from": "/nowhere", "tasks": tasks_of})
    base = Stage1Config.model_validate(values)
    training = open_run(base)
    training.config = config
    found = VideoScores(training, read_index(base.out)).score()
    of_tasks = [
        name for name in found if any(task in name for task in tasks) and not name.endswith(("low", "high"))
    ]
    assert "score/frozen n6" in found and len(of_tasks) == 2
    assert sum(int(name.rpartition(" n")[2]) for name in of_tasks) == 6
    training.close()


def test_looks_write_scores_where_they_are_due(
    stage_values: Values, tiny_encoder: dict[str, Any], short_previews: None
) -> None:
    validation = scored(tiny_encoder, "flicker") | {"metrics_every_samples": 8, "metrics_videos": 2}
    config = Stage1Config.model_validate(stage_values(validation=validation))
    training = open_run(config)
    log = MetricsLog(training.run)
    reporter, signals = Reporter(training, log), StopSignals(training.run, training.agree, looks=False)
    looks = Looks(training, read_index(config.out), reporter, signals)
    for _ in range(4):
        training.step()
        looks.look()
    assert [r["samples"] for r in log.records if "score/flicker n2" in r] == [8, 16]
    assert MetricsLog(training.run, position=16).scored == {8, 16}  # a later life does not do them again
    assert grouped("score/flicker n2") == "scores/flicker n2"
    signals.close()
    training.close()


def test_metrics_that_the_videos_cannot_have_are_refused(
    stage_values: Values, tiny_encoder: dict[str, Any]
) -> None:
    for metric, why in (
        ("fvd", "i3d needs 9 frames"),
        ("fid", "no inception weights"),
        ("fvdd", "no metric fvdd"),
    ):
        config = Stage1Config.model_validate(stage_values(validation=scored(tiny_encoder, metric)))
        with pytest.raises(ConfigError, match=why):
            check_metrics(config, has_references=True)


def test_metrics_of_references_are_refused_where_no_prompt_has_any(
    stage_values: Values, tiny_encoder: dict[str, Any]
) -> None:
    values = stage_values(validation=scored(tiny_encoder, "clip_i"))
    with pytest.raises(ConfigError, match=r"validation\.metrics clip_i: needs prompts with reference pictures"):
        inspect(Stage1Config.model_validate(values))


def test_a_bucket_of_fewer_frames_counts(stage_values: Values) -> None:
    short = {"num_frames": 16, "buckets": [{"num_frames": 16}, {"num_frames": 8}, {"media": "image"}]}
    validation = {"num_samples": 0, "metrics": ["is_i3d"]}
    config = Stage1Config.model_validate(stage_values(**short, validation=validation))
    with pytest.raises(ConfigError, match="i3d needs 9 frames"):
        check_metrics(config, has_references=False)


def test_a_metric_without_a_score_is_told_once(
    stage_values: Values, tiny_encoder: dict[str, Any], capsys: pytest.CaptureFixture[str], short_previews: None
) -> None:
    config = Stage1Config.model_validate(stage_values(validation=scored(tiny_encoder, "clip_i", "flicker")))
    training = open_run(config)
    scores = VideoScores(training, read_index(config.out))
    assert {name.split()[0] for name in scores.score() | scores.score()} == {"score/flicker"}
    assert capsys.readouterr().err.count("not score/clip_i: can't be computed: no video") == 1
    training.close()


def test_other_metrics_are_no_other_run(stage_values: Values, tiny_encoder: dict[str, Any]) -> None:
    values = stage_values()
    one = Stage1Config.model_validate(values | {"validation": {"num_samples": 0}})
    other = Stage1Config.model_validate(values | {"validation": scored(tiny_encoder, "flicker")})
    assert one.hash() == other.hash()
