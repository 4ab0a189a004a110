"""Laws of the plan: a fitted law gives its own points back, and every number names its source."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from infra.errors import ConfigError
from model.data.order import Order
from model.data.plan import LANES
from pipeline.memory.retrieve import RETRIEVERS
from pipeline.report import estimate
from pipeline.report.estimate import (
    DRIVER_BYTES,
    DRIVER_S,
    SHARED,
    PlanConfig,
    _join,
    fit_law,
    load_profile,
    plan,
    run,
    shared_reads,
)
from tests.bench import bench_scale
from tests.bench.bench_scale import Cost, profile_run

COSTS = st.sampled_from([0.0, 1.0, 3.0, 10.0])


@given(COSTS, COSTS)
def test_a_fitted_law_gives_its_points_back(fixed: float, each: float) -> None:
    """Parts of like weight in the middle of the runs, of which one may be absent."""
    assume(fixed or each)

    def cost(n: float) -> float:
        return fixed + each * n / 3e4

    law = fit_law([(n, cost(n)) for n in (1000, 10_000, 100_000, 1_000_000)])
    for n in (1000, 50_000, 1_000_000, 500_000_000):
        assert law(n) == pytest.approx(cost(n), rel=1e-6)
    assert "extrapolated 10x" in law.source(10_000_000) and "extrapolated" not in law.source(50_000)


def test_a_law_never_falls_and_a_lone_point_is_shared_out() -> None:
    noisy = [
        fit_law(points) for points in ([(1000, 20.0), (10_000, 15.0), (100_000, 90.0)], [(10, 9.0), (99, 1.0)])
    ]
    assert all(min(law.fixed, law.each) >= 0 for law in noisy)
    assert fit_law([(100, 5.0)])(1000) == pytest.approx(50.0)
    with pytest.raises(ValueError, match="no measured point"):
        fit_law([(100, 0.0)])


def test_every_line_has_a_source_and_the_plan_is_called_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(PlanConfig(nodes=10))
    printed = capsys.readouterr().out
    assert printed.startswith("ESTIMATE") and "500,000,000" in printed
    assert all(line.source for line in lines)
    named = {"embed, CPU hours", "duplicates", "build, wall", "join bm25, wall", "memory of a worker"}
    assert named <= {line.what for line in lines}


def test_every_part_that_the_benchmark_measures_is_in_the_plan() -> None:
    """What build-index and augment do no more, or newly do, must not be planned by old laws."""
    run_of_profile = load_profile(None)["scale"]["runs"][0]
    assert set(run_of_profile) == {"rows", *SHARED, DRIVER_S, DRIVER_BYTES, "worker_bytes", "join_s"}
    assert set(run_of_profile["join_s"]) == set(RETRIEVERS)
    parts = {part for names in bench_scale.SHARED.values() for part in names}
    kinds = {*parts, bench_scale.DRIVER, *(f"join {name}" for name in RETRIEVERS)}
    assert set(profile_run(1, dict.fromkeys(kinds, Cost(1.0, 1.0, 1)))) == set(run_of_profile)


def test_no_captions_cost_no_join() -> None:
    seconds = [
        _join(PlanConfig(documents=10**6, captions=count), load_profile(None)["scale"]) for count in (0, 10**6)
    ]
    assert {line.value for line in seconds[0]} == {"0 s"} and "0 s" not in {line.value for line in seconds[1]}


def test_what_would_break_is_said_with_its_cure() -> None:
    """Too little memory for a worker a core, months of embedding, ranks that share row groups."""
    tight = plan(PlanConfig(ram_gb_per_node=16, cpus_per_node=64, nodes=1, gpus_per_node=5, documents=10**7))
    said = {line.what: line for line in tight}
    assert "cure: num_workers up to" in said["BREAKS: memory of the workers"].source
    assert (
        said["SLOW: reads of stage 1"].value == "5 times"
        and "cure: 4 ranks" in said["SLOW: reads of stage 1"].source
    )
    slow = {line.what for line in plan(PlanConfig(cpus_per_node=2, documents=10**9))}
    assert {"BREAKS: patience", "BREAKS: patience, join bm25", "BREAKS: patience, join clip"} <= slow
    with_gpus = {line.what for line in plan(PlanConfig(cpus_per_node=2, documents=10**9, gpus_per_node=1))}
    assert "BREAKS: patience, join clip" not in with_gpus
    well = plan(PlanConfig(documents=10**6, captions=10**5, gpus_per_node=8))
    assert [line.value for line in well if "break" in line.what.lower()] == ["nothing known"]


@pytest.mark.parametrize("ranks", [1, 5, 8, 36, 48, 64])
def test_reads_of_a_row_group_are_those_of_the_trainers_order(ranks: int) -> None:
    """Counted in an epoch: one row group a lane, long enough for every rank that walks it to meet it."""
    rows = 64 * LANES
    order = Order(np.full(LANES, rows // LANES), seed=1, lanes=LANES, window_rows=8)
    met = {(position % ranks, order.locate(position)[0]) for position in range(rows)}
    assert len(met) == LANES * shared_reads(PlanConfig(gpus_per_node=ranks))
    assert estimate.LANES == LANES


def test_twice_the_nodes_halve_the_embedding_and_not_the_disk() -> None:
    one, two = plan(PlanConfig(documents=10**8, nodes=2)), plan(PlanConfig(documents=10**8, nodes=4))
    same = {line.what: line.value for line in one}
    other = {line.what: line.value for line in two}
    assert same["vectors on disk"] == other["vectors on disk"]
    assert same["embed, CPU hours"] == other["embed, CPU hours"]
    assert same["embed, wall"] != other["embed, wall"]
    assert any("GPU" in line.what for line in plan(PlanConfig(gpus_per_node=8)))


def test_a_profile_of_ones_own_is_used_and_a_bad_one_refused(tmp_path: Path) -> None:
    stored = load_profile(None)
    own = {"machine": {"cpus": 8, "processor": "x"}, "scale": stored["scale"]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    sources = {line.what: line.source for line in plan(PlanConfig(profile=str(tmp_path / "own.json")))}
    assert "8 CPUs" in sources["embed, CPU hours"]
    with pytest.raises(ConfigError, match=r"no embedding rate of 'ViT-Q'.*legal: ViT-B-32, offline"):
        plan(PlanConfig(clip="ViT-Q"))
    (tmp_path / "bad.json").write_text('{"scale": 3}')
    for name in ("bad.json", "absent.json"):
        with pytest.raises(ConfigError, match="can't be used"):
            load_profile(str(tmp_path / name))
