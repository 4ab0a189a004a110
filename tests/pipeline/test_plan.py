"""Laws of the plan: a fitted law gives its own points back, and every number names its source."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from pipeline.estimate import PlanConfig, fit_law, load_profile, plan, run


@given(st.floats(1e-6, 10), st.floats(0.5, 2.0))
def test_a_fitted_law_gives_its_points_back(a: float, p: float) -> None:
    law = fit_law([(n, a * n**p) for n in (1000, 10_000, 100_000)])
    assert law.p == pytest.approx(p, rel=1e-6)
    assert law(50_000) == pytest.approx(a * 50_000**p, rel=1e-6)
    linear = a * 100_000**p * 10
    assert law(1_000_000) == pytest.approx(max(a * 1_000_000**p, linear), rel=1e-6)
    assert "extrapolated 10x" in law.source(1_000_000) and "extrapolated" not in law.source(50_000)


def test_every_line_has_a_source_and_the_plan_is_called_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(PlanConfig(nodes=10))
    printed = capsys.readouterr().out
    assert printed.startswith("ESTIMATE") and "500,000,000" in printed
    assert all(line.source for line in lines)
    assert {"embed, CPU hours", "index in memory", "wall time"} <= {line.what for line in lines}


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
    own = {"machine": {"cpus": 8, "processor": "x", "dim": 64}, "index": stored["index"]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert "8 CPUs" in plan(PlanConfig(profile=str(tmp_path / "own.json")))[0].source
    with pytest.raises(ConfigError, match=r"no embedding rate of 'ViT-Q'.*legal: ViT-B-32, offline"):
        plan(PlanConfig(clip="ViT-Q"))
    (tmp_path / "bad.json").write_text('{"index": 3}')
    for name in ("bad.json", "absent.json"):
        with pytest.raises(ConfigError, match="can't be used"):
            load_profile(str(tmp_path / name))
