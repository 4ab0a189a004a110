"""Laws of the validation loss: fixed, resumable to the bit, honest about held-out rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.data.shards import open_shards
from model.training.config import Stage1Config
from model.training.driver import Looks
from model.training.loop import Training
from model.training.metrics import MetricsLog
from model.training.preflight import prepare_index, read_index
from model.training.report import Reporter
from model.training.validate import QUANTILES, Preview, Validation
from tests.model.runs import fingerprint

Values = Callable[..., dict[str, Any]]


def open_run(config: Stage1Config) -> tuple[Training, Validation]:
    prepare_index(config, open_shards(config.prompts))
    index = read_index(config.out)
    training = Training(config, index)
    return training, Validation(training, index)


def test_validation_is_bitwise_equal_before_and_after_resume(stage_values: Values) -> None:
    config = Stage1Config.model_validate(stage_values())
    first, validation = open_run(config)
    for _ in range(2):
        first.step()
    first.save({})
    before = validation.run()
    first.close()
    second, again = open_run(config)
    assert second.position == 8
    assert again.run() == before
    second.close()


def test_validation_disturbs_nothing(stage_values: Values, tmp_path: Path) -> None:
    hashes = []
    for name in ("with", "without"):
        config = Stage1Config.model_validate(stage_values(out=str(tmp_path / name)))
        training, validation = open_run(config)
        for _ in range(3):
            training.step()
            if name == "with":
                validation.run()
        hashes.append(training.weights_sha256())
        training.close()
    assert hashes[0] == hashes[1]


def test_grid_has_every_cell(stage_values: Values, make_shards, make_row) -> None:
    rows = [
        make_row(n, media="image" if n % 2 else "video", num_frames=4, height=12, width=16) for n in range(16)
    ]
    values = stage_values(
        prompts=str(make_shards(rows=rows, name="mixed")),
        buckets=[{"media": "video"}, {"media": "image"}],
        validation={"num_samples": 2},
    )
    training, validation = open_run(Stage1Config.model_validate(values))
    record = validation.run()
    cells = [k for k in record if k.startswith("val/cell")]
    assert len(cells) == 2 * 2 * len(QUANTILES)  # medium x retrieval x quantile
    assert record["val/held_out"] == 0
    assert all(v > 0 for k, v in record.items() if k != "val/held_out")
    training.close()


def test_held_out_rows_are_validated_and_never_trained_on(stage_values: Values) -> None:
    config = Stage1Config.model_validate(stage_values(validation={"num_samples": 50, "held_out_frac": 0.4}))
    training, validation = open_run(config)
    groups = training.loader.row_groups
    kept = {groups.row(chosen.source, 0)["prompt_id"] for chosen in validation.rows}
    seen = {i for _ in range(12) for i in next(training.batches).prompt_ids}
    assert kept and all(chosen.held_out for chosen in validation.rows) and not kept & seen
    assert len(kept) + len(seen) == 22
    training.close()


@pytest.mark.parametrize("number", [0])
def test_no_samples_switch_it_off(stage_values: Values, number: int) -> None:
    config = Stage1Config.model_validate(stage_values(validation={"num_samples": number}))
    training, validation = open_run(config)
    assert validation.run() == {}
    training.close()


def test_previews_disturb_nothing_and_are_the_same_bytes_each_time(
    stage_values: Values, short_previews: None
) -> None:
    config = Stage1Config.model_validate(stage_values())
    training, _ = open_run(config)
    training.step()
    before = fingerprint(training)
    preview = Preview(training, read_index(config.out))
    found = []
    for _ in range(2):
        sheets = preview.make()
        assert len(sheets) == 2 and next(iter(sheets)).startswith("0 ")
        folder = Path(training.run.samples(4))
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert {"sample-000.mp4", "sample-000.png", "sample-001.mp4", "samples.json"} <= set(found[0])
    assert found[0] == found[1] and training.run.sampled_positions() == [4]
    assert fingerprint(training) == before
    training.close()


def test_a_look_that_a_kill_cut_off_is_taken_on_resume(stage_values: Values, short_previews: None) -> None:
    """The checkpoint comes first; what the log lacks at its position is looked at before the next step."""
    config = Stage1Config.model_validate(stage_values(preview_every_samples=8))
    training, validation = open_run(config)
    for _ in range(2):
        training.step()
    training.save({})
    expected = validation.run()
    training.close()
    for _ in range(2):
        training, _ = open_run(config)
        log = MetricsLog(training.run, position=training.position)
        Looks(training, read_index(config.out), Reporter(training, log)).look()
        training.close()
    assert training.run.records() == [{"samples": 8, **expected}, {"samples": 8, "videos": 2}]
