"""Laws of what stage 2 keeps of stage 1: the same rows and noise as long as it runs, told in every record."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.validation_cells import KEPT, SINCE_START, Cell, cells_of
from model.data.batch import read_prompt
from model.data.shards import open_shards
from model.training.config import Stage1Config, Stage2Config
from model.training.driver import Looks, check
from model.training.loop import Training
from model.training.metrics import MetricsLog, grouped
from model.training.preflight import prepare_index, read_index
from model.training.report import Reporter, validation_line
from model.training.stop_signals import StopSignals
from model.training.validation.kept import Kept, find_kept, prepare_kept
from model.training.validation.loss import QUANTILES
from tests.model.runs import advance, open_training
from tests.model.training.validation.test_loss import task_rows

Values = Callable[..., dict[str, Any]]


@pytest.fixture
def stages(stage_values: Values, make_shards, make_row, tmp_path: Path) -> tuple[Stage1Config, Stage2Config]:
    """A stage 1 of one step that keeps rows back, and a stage 2 over all three tasks that starts from it."""
    values = stage_values(validation={"num_samples": 5, "held_out_frac": 0.4}, out=str(tmp_path / "one"))
    one = Stage1Config.model_validate(values)
    training = open_training(one)
    advance(training, 1)
    training.save({})
    training.close()
    instructions = str(make_shards(rows=task_rows(make_row, 24), name="instructions"))
    two = values | {"prompts": instructions, "out": str(tmp_path / "two"), "start_from": one.out}
    return one, Stage2Config.model_validate(two | {"preview_every_samples": 0})


def open_two(config: Stage2Config) -> tuple[Training, Looks]:
    prepare_index(config, open_shards(config.prompts))
    assert prepare_kept(config) is None
    training = Training(config, read_index(config.out))
    log = MetricsLog(training.run, position=training.position)
    signals = StopSignals(training.run, training.agree, looks=False)
    return training, Looks(training, read_index(config.out), Reporter(training, log), signals)


def test_rows_are_those_that_stage_one_kept_back(stages: tuple[Stage1Config, Stage2Config]) -> None:
    one, two = stages
    training, looks = open_two(two)
    before = open_training(one)
    seen = {i for _ in range(12) for i in next(before.batches).clip_ids}
    watched = [looks.kept.groups.row(row.source, 0) for row in looks.kept.rows]
    assert watched and all(row.held_out for row in looks.kept.rows)
    assert not seen & {row["clip_id"] for row in watched}
    for number, row in enumerate(watched):  # with all the documents that stage 1 read, and no instruction
        assert looks.kept.prompts(number) == {"right": read_prompt(row)}
    before.close()
    training.close()


def test_the_start_is_measured_once_and_every_look_is_compared_with_it(
    stages: tuple[Stage1Config, Stage2Config],
) -> None:
    _, config = stages
    training, looks = open_two(config)
    looks.begin()
    training.close()
    training, looks = open_two(config)
    looks.begin()  # the life before was cut off ahead of its first checkpoint
    advance(training, 2)
    training.save({})
    looks.look()
    expected = training.run.records()
    training.close()
    start, later = expected
    assert start["samples"] == 0 and later["samples"] == 8 and set(start) < {*later, "samples"}
    losses = [Cell(KEPT, "right", quantile).name for quantile in (None, *QUANTILES)]
    assert all(start[name] > 0 and later[name] != start[name] for name in losses)
    assert later[SINCE_START] == pytest.approx(later[losses[0]] - start[losses[0]])
    assert 0 < later[f"{SINCE_START} error"] < abs(later[losses[0]])
    assert any(cell.of == "video subject_driven" for cell in cells_of(later))  # beside its own
    line = validation_line(later)
    assert f"{KEPT} right {later[losses[0]]:.4f} (since the start {later[SINCE_START]:+.4f}" in line
    assert grouped(SINCE_START).startswith("validation/")
    training, looks = open_two(config)  # resumed: the same number, to the bit
    assert looks.kept.run() == {k: v for k, v in later.items() if KEPT in k}
    training.close()


def test_where_stage_one_read_is_no_more_that_is_said_and_training_goes_on(
    stages: tuple[Stage1Config, Stage2Config], tmp_path: Path
) -> None:
    one, config = stages
    moved = tmp_path / "moved"
    shutil.move(one.prompts, moved)
    why = prepare_kept(config)
    assert why is not None and "no certified prompts" in why
    prepare_index(config, open_shards(config.prompts))
    training = Training(config, read_index(config.out))
    assert Kept(training).run() == {}
    training.close()
    found = find_kept(config.model_copy(update={"stage1_prompts": str(moved)}))
    assert isinstance(found, dict) and len(found["rows"]) == 5
    with pytest.raises(ConfigError, match="no certified prompts"):
        check(config.model_copy(update={"stage1_prompts": one.prompts}))


def test_stage_one_watches_nothing(stages: tuple[Stage1Config, Stage2Config]) -> None:
    one, _ = stages
    assert prepare_kept(one) is None
    training = open_training(one)
    assert Kept(training).rows == [] and not RunFolder(one.out).records()
    training.close()
