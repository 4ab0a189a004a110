"""The demo runs commands as a user types them, and ends as they end."""

import sys

import pytest

from cli import demo, evidence, steps


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo"])  # put back afterwards


def test_a_command_that_ends_well_lets_the_next_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    steps.run_step("vimi-data plan --documents 1000", name="demo")
    assert "1,000 documents" in capsys.readouterr().out


def test_a_command_that_is_refused_ends_the_demo_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    step = "vimi-data augment --config nowhere.yaml"
    with pytest.raises(SystemExit) as ended:
        steps.run_step(step, name="demo")
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert "vimi-data: " in told and f"demo: `{step}` ended with exit code 2" in told


def test_a_command_that_is_stopped_stops_the_demo(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches whichever line runs: here the first one of a real command."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.report.estimate.check", interrupted)
    step = "vimi-data plan --documents 1000"
    monkeypatch.setattr(demo, "run_demo", lambda: steps.run_step(step, name="demo"))
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 130
    assert "demo: stopped; the same command continues where it was" in capsys.readouterr().err


def test_every_command_is_one_of_the_installed_programs() -> None:
    of_demo = [step for _, step in demo.steps()]
    for found in (of_demo, evidence.quick_steps(), evidence.full_steps()):
        assert {step.split()[0] for step in found} == set(steps.PROGRAMS)
