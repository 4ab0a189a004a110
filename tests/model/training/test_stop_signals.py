"""Laws of stop signals: heard once, agreed on by all, and never a reason to die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.run_folder import RunFolder
from model.training.stop_signals import SAME_PRESS_S, Interrupts, StopSignals

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
