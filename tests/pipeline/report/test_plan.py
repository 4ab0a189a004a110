"""Laws of the plan: a fitted law gives its own points back, and every number names its source."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from infra.errors import ConfigError
from pipeline.memory.retrieve import RETRIEVERS
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
    assert "8 CPUs" in plan(PlanConfig(profile=str(tmp_path / "own.json")))[0].source
    with pytest.raises(ConfigError, match=r"no embedding rate of 'ViT-Q'.*legal: ViT-B-32, offline"):
        plan(PlanConfig(clip="ViT-Q"))
    (tmp_path / "bad.json").write_text('{"scale": 3}')
    for name in ("bad.json", "absent.json"):
        with pytest.raises(ConfigError, match="can't be used"):
            load_profile(str(tmp_path / name))
