"""What stands in one table of scores may be compared; everything else stands apart."""

from typing import Any

import pytest

from infra.errors import ConfigError
from pipeline.report import ReportConfig, check
from pipeline.report.scores import Evaluation, curves, missing, score_tables


def evaluation(
    name: str, *, protocol: str = "p", value: float = 1.0, position: int | None = None, **found: Any
):
    system = {"run": "base", "position": position, "num_steps": 4, "ema": "weights"} if position else {}
    manifest = {
        "networks": {"i3d": {"name": "i3d-kinetics-400", "sha256": "af5c50f0df57"}},
        "frames": {"num_frames": 16, "fps": None, "stride": 1},
        "system": system,
    }
    values = {"value": value, "interval": [0.5, 1.5], "better": "lower", "small_n": False, "best": []}
    values |= {"n": 300, "n_real": 300, "failed": 2, "failed_real": 1}
    values |= {"protocol": protocol, "manifest": manifest}
    whole = {"scores": {"fvd": values | found}, "not_computed": {"fid": "no weights"}, "failed": []}
    return Evaluation(name, f"/{name}", whole)


def test_other_protocols_never_share_a_table() -> None:
    tables = score_tables([evaluation("a"), evaluation("b", value=2.0), evaluation("c", protocol="q", n=200)])
    assert [[row["name"] for row in table["rows"]] for table in tables] == [["a", "b"], ["c"]]
    assert "n 300 against 300 real" in tables[0]["facts"] and "i3d-kinetics-400 af5c50f0" in tables[0]["facts"]
    assert tables[0]["rows"][1] == {
        "name": "b",
        "system": "videos as given",
        "value": "2",
        "interval": "0.5 to 1.5",
        "failed": "3 failed",
    }


def test_curves_are_over_checkpoints_of_one_run_and_protocol() -> None:
    found = [evaluation(f"e{n}", position=1000 * n, value=10.0 / n) for n in (1, 2, 3)]
    (curve,) = curves([*found, evaluation("other", protocol="q", position=4000)])
    assert curve["title"] == "fvd of base" and "svg" in curve["chart"]
    assert curves(found[:1]) == []


def test_what_was_not_computed_is_told() -> None:
    assert missing([evaluation("a")]) == ["a: no fid: no weights"]


def test_scores_are_an_evaluations(tmp_path) -> None:
    with pytest.raises(ConfigError, match="vimi-train evaluate"):
        check(ReportConfig(out=str(tmp_path / "page.html"), scores=(str(tmp_path),)))
