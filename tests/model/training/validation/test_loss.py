"""Laws of the validation loss: fixed, resumable to the bit, honest about held-out rows."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.run_folder import RunFolder
from infra.validation_cells import Cell, cells_of
from model.data.buckets import VALIDATION, Bucket
from model.data.loader import RowGroups
from model.data.shards import index_shards, open_shards
from model.prompt.select import retrieved
from model.training.config import Stage1Config
from model.training.driver import Looks
from model.training.loop import Training
from model.training.metrics import MetricsLog
from model.training.preflight import prepare_index, read_index, write_index
from model.training.report import Reporter, validation_line
from model.training.stop_signals import StopSignals
from model.training.validation.loss import QUANTILES, Validation, choose_rows, summarise
from model.training.validation.preview import Preview
from tests.model.conftest import shake
from tests.model.runs import fingerprint

Values = Callable[..., dict[str, Any]]


def open_run(config: Stage1Config) -> tuple[Training, Validation]:
    prepare_index(config, open_shards(config.prompts))
    index = read_index(config.out)
    training = Training(config, index)
    return training, Validation(training, index)


def validated_after_two_steps(config: Stage1Config) -> Any:
    """What validation finds at the checkpoint that this leaves."""
    training, validation = open_run(config)
    for _ in range(2):
        training.step()
    training.save({})
    found = validation.run()
    training.close()
    return found


def test_validation_is_bitwise_equal_before_and_after_resume(stage_values: Values) -> None:
    config = Stage1Config.model_validate(stage_values())
    before = validated_after_two_steps(config)
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
    shake(training.model)  # a fresh one says the same to every document: nothing
    record = validation.run()
    cells = cells_of(record)
    losses = {cell: loss for cell, loss in cells.items() if not cell.is_gain}
    assert {cell.of for cell in cells} == {"video", "image"} and record["val/video rows"] == 2
    assert len(losses) == 2 * 3 * (len(QUANTILES) + 1)  # medium x documents x quantile, and their mean
    assert len(cells) == len(losses) + 2 * 2 * (len(QUANTILES) + 1) * 2  # gain and error of none and shuffled
    assert record["val/held_out"] == 0 and all(loss > 0 for loss in losses.values())
    for cell, loss in losses.items():
        gain = cells.get(replace(cell, is_gain=True), 0.0)
        assert gain == pytest.approx(loss - losses[replace(cell, given="right")], abs=1e-9)
        if cell.quantile is None:
            each = [losses[replace(cell, quantile=quantile)] for quantile in QUANTILES]
            assert loss == pytest.approx(sum(each) / len(each))
    assert len({*losses.values()}) == len(losses)  # documents, level and medium all count
    training.close()


def test_errors_are_those_of_paired_differences() -> None:
    """A row that is hard whatever its documents adds nothing to the error of what they gain."""
    losses = torch.tensor([0.0, 100.0, 7.0])[:, None, None].repeat(1, 4, len(QUANTILES)).double()
    losses[:, 0] += torch.tensor([0.1, 0.2, 0.3])[:, None]  # without documents
    cells = cells_of(summarise("video", losses, torch.tensor([[True, True, True, False]] * 3)))
    none = Cell("video", "none", QUANTILES[-1], is_gain=True)
    assert cells[none] == pytest.approx(0.2)
    assert cells[replace(none, is_error=True)] == pytest.approx(0.1 / 3**0.5)
    shuffled = replace(none, given="shuffled")
    assert cells[shuffled] == cells[replace(shuffled, is_error=True)] == 0


def test_one_row_has_no_error_and_nobody_elses_documents(stage_values: Values) -> None:
    training, validation = open_run(Stage1Config.model_validate(stage_values(validation={"num_samples": 1})))
    cells = cells_of(validation.run())
    assert {cell.given for cell in cells} == {"right", "none"}
    assert not any(cell.is_error for cell in cells)
    training.close()


def test_shuffled_documents_are_another_rows_and_never_a_rows_own(
    stage_values: Values, make_shards, make_row
) -> None:
    rows = [make_row(n, num_frames=4, height=12, width=16) for n in range(12)]
    for row in rows[:3]:
        row["segments"] = row["segments"][-1:]  # the guard left it no document
    values = stage_values(prompts=str(make_shards(rows=rows, name="some")), validation={"num_samples": 12})
    training, validation = open_run(Stage1Config.model_validate(values))
    prompts = [validation.prompts(number) for number in range(12)]
    assert sorted(map(len, prompts)) == [1] * 3 + [3] * 9
    documents = [retrieved(each["right"]) for each in prompts if "right" in each]
    for each in prompts:
        if "right" in each:
            assert retrieved(each["shuffled"]) in documents
            assert set(retrieved(each["shuffled"])).isdisjoint(retrieved(each["right"]))
            assert tuple(s for s in each["shuffled"] if s.role != "retrieved") == each["none"]
    assert [validation.prompts(number) for number in range(12)] == prompts  # the same each time
    training.close()


def task_rows(make_row, count: int = 12, **options: Any) -> list[dict[str, Any]]:
    """Rows of the three tasks in turn, as `vimi-data instruct` makes their segments."""
    tasks = ["text_to_video", "video_prediction", "subject_driven"]
    rows = [make_row(n, task=tasks[n % 3], num_frames=4, height=12, width=16, **options) for n in range(count)]
    for row in rows:
        if row["task"] != "text_to_video":
            role = "first_frame" if row["task"] == "video_prediction" else "subject"
            words = {"text": "ball" if role == "subject" else None}
            row["segments"] = [row["segments"][-1], {**row["segments"][1], "role": role, **words}]
    return rows


def test_tasks_are_validated_apart_with_all_that_they_show_and_with_nothing(
    stage_values: Values, make_shards, make_row
) -> None:
    shards = make_shards(rows=task_rows(make_row), name="tasks")
    training, validation = open_run(
        Stage1Config.model_validate(stage_values(prompts=str(shards), validation={"num_samples": 12}))
    )
    shake(training.model)
    record = validation.run()
    found: dict[tuple[str, str], set[str]] = {}
    for cell in cells_of(record):
        found.setdefault((cell.of, cell.axis), set()).add(cell.given)
    tasks = ("text_to_video", "video_prediction", "subject_driven")
    assert found == {
        ("video", "documents"): {"right", "none", "shuffled"},
        ("video text_to_video", "documents"): {"right", "none", "shuffled"},
        ("video video_prediction", "documents"): {"none"},
        ("video subject_driven", "documents"): {"none"},
        **{(f"video {task}", "references"): {"own", "none"} for task in tasks},
    }
    assert record["val/video rows"] == 3 * record["val/video subject_driven rows"] == 12
    # Rows without documents gain nothing for sure: they are no evidence.
    for gain in ("none - right", "shuffled - right", "none - right q0.9 error"):
        assert record[f"val/video {gain}"] == record[f"val/video text_to_video {gain}"]
    for task in tasks:
        own, none = (record[f"val/video {task} references {given}"] for given in ("own", "none"))
        assert own != none and record[f"val/video {task} none - own"] == pytest.approx(none - own)
    assert record["val/video text_to_video references none"] == record["val/video text_to_video documents none"]
    line = validation_line({"samples": 8, **record})
    assert all(f"video {task} own" in line for task in tasks)
    training.close()


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_rarest_task_is_validated_as_often_as_the_others(split: str, make_shards, make_row) -> None:
    counts = {"subject_driven": 2, "text_to_video": 30, "video_prediction": 30}
    tasks = [task for task, count in counts.items() for _ in range(count)]
    rows = [make_row(n, task=task, num_frames=4, height=12, width=16) for n, task in enumerate(tasks)]
    shards = open_shards(str(make_shards(rows=[row | {"split": split} for row in rows], name="unequal")))
    buckets = (Bucket("video", 4, 12, 16),)
    index, groups = index_shards(shards, buckets), RowGroups(shards, buckets)
    for count, expected in [(6, [2, 2, 2]), (16, [2, 7, 7]), (99, [2, 30, 30])]:
        chosen = choose_rows(buckets, len(shards.groups), index, count)
        read = [groups.row(one.source, 0) for one in chosen]
        assert [Counter(row["task"] for row in read)[task] for task in counts] == expected
        assert len({row["clip_id"] for row in read}) == len(read)
        assert all(one.held_out == (split == "val") for one in chosen)


def test_an_index_that_hides_the_tasks_of_held_out_rows_is_made_again(stage_values: Values) -> None:
    values = stage_values(validation={"num_samples": 2, "held_out_frac": 0.4})
    config = Stage1Config.model_validate(values)
    shards = open_shards(config.prompts)
    index = prepare_index(config, shards)
    tasks = [VALIDATION.strip() if t.startswith(VALIDATION) else t for t in index["task"].to_pylist()]
    assert tasks != index["task"].to_pylist()
    write_index(config.out, index.set_column(2, "task", [tasks]))  # as an earlier version left it
    assert prepare_index(config, shards) == read_index(config.out) == index


def test_without_references_a_word_stands_in_its_pictures_place(
    stage_values: Values, make_shards, make_row
) -> None:
    shards = make_shards(rows=task_rows(make_row), name="tasks")
    training, validation = open_run(
        Stage1Config.model_validate(stage_values(prompts=str(shards), validation={"num_samples": 12}))
    )
    for number in range(12):
        prompts = validation.prompts(number)
        bare = prompts.get("bare", prompts["none"])
        assert all(segment.type == "text" for segment in bare)
        if any(segment.role == "subject" for segment in prompts["none"]):
            assert bare[-1].text is not None and bare[-1].text.endswith("ball")
    training.close()


def test_held_out_rows_are_validated_and_never_trained_on(stage_values: Values) -> None:
    config = Stage1Config.model_validate(stage_values(validation={"num_samples": 50, "held_out_frac": 0.4}))
    training, validation = open_run(config)
    groups = training.loader.row_groups
    kept = {groups.row(chosen.source, 0)["clip_id"] for chosen in validation.rows}
    seen = {i for _ in range(12) for i in next(training.batches).clip_ids}
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
    expected = validated_after_two_steps(config)
    for _ in range(2):
        training, _ = open_run(config)
        log = MetricsLog(training.run, position=training.position)
        signals = StopSignals(training.run, training.agree, looks=False)
        Looks(training, read_index(config.out), Reporter(training, log), signals).look()
        training.close()
    assert RunFolder(config.out).records() == [{"samples": 8, **expected}, {"samples": 8, "videos": 2}]
