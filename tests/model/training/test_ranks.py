"""Laws of many ranks: the same samples at every step for any number of them, and weights that end alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.run_folder import RunFolder
from model.training.checkpoint import read_facts
from model.training.config import Stage1Config
from model.training.driver import run
from tests.model.runs import advance, alone, on_ranks, open_training, relative_distance, weights_at

Values = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("world", "mode"),
    [(3, "fsdp"), *(pytest.param(2, mode, marks=pytest.mark.slow) for mode in ("fsdp", "ddp"))],
)
def test_ranks_see_the_samples_of_one_and_end_alike(
    stage_values: Values, tmp_path: Path, world: int, mode: str
) -> None:
    """Also uneven ones: of four samples on three ranks, one of them takes two."""
    values = stage_values(parallel={"mode": mode}, self_condition_rate=0.5)
    many = on_ranks(world, values | {"out": str(tmp_path / "many")}, tmp_path / "many.json", 4)
    ids, expected = alone(values | {"out": str(tmp_path / "one")}, 4)
    assert many["ids"] == ids
    assert relative_distance(weights_at(str(tmp_path / "many")), expected) < 1e-6
    # What many ranks wrote, one rank continues.
    again = open_training(Stage1Config.model_validate(values | {"out": str(tmp_path / "many")}))
    assert again.position == 16
    assert again.weights_sha256() == many["sha"]
    advance(again, 1)
    again.close()


@pytest.mark.slow
def test_hybrid_sharding_ends_like_one_rank(
    stage_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of two ranks each."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    values = stage_values(parallel={"mode": "hsdp"}, self_condition_rate=0.5)
    four = on_ranks(4, values | {"out": str(tmp_path / "four")}, tmp_path / "four.json", 4)
    ids, expected = alone(values | {"out": str(tmp_path / "one")}, 4)
    assert four["ids"] == ids
    assert relative_distance(weights_at(str(tmp_path / "four")), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("lives", [[2] * 1, [3] * 1, [2, 1, 3]], ids=["two", "three", "two-one-three"])
def test_fifty_steps_on_any_ranks_differ_by_rounding(
    stage_values: Values, tmp_path: Path, lives: list[int]
) -> None:
    values = stage_values(batch_size=6, samples=300, accumulation=1)
    ids, expected = alone(values | {"out": str(tmp_path / "one")}, 50)
    seen, ends = [], [50 * (n + 1) // len(lives) for n in range(len(lives))]
    for life, (world, end) in enumerate(zip(lives, ends, strict=True)):
        report = tmp_path / f"life-{life}.json"
        found = on_ranks(world, values | {"out": str(tmp_path / "many")}, report, end - len(seen))
        assert found["position"] == end * 6
        seen += found["ids"]
    assert seen == ids
    assert relative_distance(weights_at(str(tmp_path / "many")), expected) < 1e-6


@pytest.mark.ray
@pytest.mark.slow
def test_range_of_workers_takes_what_there_is(ray_cluster: None, stage_values: Values, tmp_path: Path) -> None:
    """Two CPUs, one to three workers: two of them train, on the samples of one."""
    values = stage_values(num_workers="1-3", batch_size=6, samples=60)
    run(Stage1Config.model_validate(values))
    facts = read_facts(RunFolder(values["out"]).latest_checkpoint() or "")
    assert facts["world_size"] == 2
    _, expected = alone(values | {"out": str(tmp_path / "one")}, 10)
    assert relative_distance(weights_at(values["out"]), expected) < 1e-6
