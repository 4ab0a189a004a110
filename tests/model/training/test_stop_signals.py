"""Laws of stop signals: heard once, agreed on by all, and never a reason to die."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.run_folder import RunFolder
from model.training.stop_signals import SAME_PRESS_S, Interrupts, StopSignals
from tests.model.runs import Driver, logged

CODE = """
import os, signal
from infra.run_folder import RunFolder
from model.training.stop_signals import StopSignals, trap_sigterm
trap_sigterm()
signals = StopSignals(RunFolder({run!r}), lambda told: told, looks=False)
signals.listen()
assert not signals.leave
os.kill(os.getpid(), signal.SIGTERM)
signals.listen()
assert signals.leave and signals.save
print("alive")
"""

CHECKPOINT_WITHIN_S = 10
"""The promise of Ctrl-C after the first step, on a CPU."""


def alone(told: bool) -> bool:
    return told


def test_stop_file_is_found(tmp_path: Path) -> None:
    signals = StopSignals(RunFolder(str(tmp_path)), alone)
    signals.listen()
    assert not signals.leave and not signals.save
    (tmp_path / "stop").touch()
    for _ in range(600):
        signals.listen()
        if signals.leave:
            break
        time.sleep(0.05)
    assert signals.leave and signals.save
    signals.close()


def test_one_rank_that_heard_speaks_for_all(tmp_path: Path) -> None:
    signals = StopSignals(RunFolder(str(tmp_path)), lambda told: True, looks=False)
    signals.listen()  # another rank said so
    assert signals.leave and signals.save


def test_preemption_saves_once_and_trains_on(tmp_path: Path) -> None:
    signals = StopSignals(RunFolder(str(tmp_path)), alone, looks=False)
    heard = []
    for preempted in (False, True, True):
        signals.heed(preempted)
        signals.listen()
        heard.append((signals.save, signals.leave))
    assert heard == [(False, False), (True, False), (False, False)]


def test_sigterm_is_a_stop_signal(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", CODE.format(run=str(tmp_path))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "alive" in done.stdout, done.stderr
    assert done.returncode != -signal.SIGTERM


def test_one_press_that_arrives_twice_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = False
    with pytest.raises(KeyboardInterrupt), Interrupts(RunFolder(str(tmp_path))):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        saved = True
    assert saved and (tmp_path / "stop").exists()
    assert capsys.readouterr().err.count("stopping after a last checkpoint") == 1


@pytest.mark.parametrize(("is_saved", "presses"), [(True, 2), (False, 3)])
def test_next_press_leaves_at_once_if_there_is_a_checkpoint(
    tmp_path: Path, is_saved: bool, presses: int
) -> None:
    run = RunFolder(str(tmp_path))
    if is_saved:
        Path(run.checkpoint(8)).mkdir(parents=True)
        (Path(run.checkpoint(8)) / "committed.json").touch()
    heard = 0
    with pytest.raises(KeyboardInterrupt), Interrupts(run):
        for heard in range(1, 5):  # noqa: B007 - read below
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(SAME_PRESS_S + 0.1)
    assert heard == presses


LOOKS = {
    "validation": {"checkpoint": {"every_samples": 8}, "validation": {"num_samples": 200, "held_out_frac": 0}},
    "preview": {"preview_every_samples": 8},
    "scores": {"validation": {"metrics": ["flicker"], "metrics_videos": 16, "metrics_every_samples": 8}},
}
"""What a training looks at -> the config in which it does so from the second step on."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["the first step", "a checkpoint", *LOOKS])
def test_ctrl_c_leaves_a_checkpoint_within_its_promise(
    stage_values: Callable[..., dict[str, Any]], make_shards: Any, tmp_path: Path, moment: str
) -> None:
    """A real run, stopped as a terminal does it: the whole group of processes hears it."""
    prompts = make_shards(200, num_frames=4, height=12, width=16)
    never = {"checkpoint": {"every_samples": 80_000}, "validation": {"num_samples": 2, "held_out_frac": 0}}
    changes = {
        "samples": 80_000,
        "prompts": str(prompts),
        "ray": {"num_cpus": 1},
        **never,
        **LOOKS.get(moment, {}),
    }
    if moment == "a checkpoint":
        changes["checkpoint"] = {"every_samples": 4}
    driver = Driver(tmp_path, stage_values(**changes))
    if moment in LOOKS:
        wait_until(driver, lambda: looks_at(driver.run) == moment)
    elif moment == "a checkpoint":
        wait_until(driver, lambda: bool(RunFolder(str(driver.run)).half_written()))
    else:
        driver.wait_for_samples(4)
    seen, pressed_s = max(logged(driver.run)), time.monotonic()
    os.killpg(driver.process.pid, signal.SIGINT)
    wait_until(driver, lambda: max(RunFolder(str(driver.run)).positions(), default=0) >= seen)
    took_s = time.monotonic() - pressed_s
    assert driver.finish() == 130, driver.log[-2000:]
    assert took_s < CHECKPOINT_WITHIN_S, driver.log[-2000:]
    assert "stopping after a last checkpoint" in driver.log
    last = RunFolder(str(driver.run)).latest_checkpoint()
    assert f"the last checkpoint: {last}" in driver.log and "the same command continues" in driver.log


def wait_until(driver: Driver, holds: Callable[[], bool]) -> None:
    for _ in range(150_000):  # five minutes: a busy machine starts slowly
        if holds():
            return
        assert driver.process.poll() is None, driver.log[-2000:]
        time.sleep(0.002)
    raise AssertionError(driver.log[-2000:])


def looks_at(run: Path) -> str | None:
    """What the training looks at just now."""
    try:
        return json.loads((run / "progress.json").read_text())["what"]
    except (OSError, ValueError):
        return None
