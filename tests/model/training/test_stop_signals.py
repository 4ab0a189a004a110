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
signals = StopSignals(RunFolder({run!r}), looks=False)
signals.listen(lambda told: told, False)
assert not signals.leave
os.kill(os.getpid(), signal.SIGTERM)
signals.listen(lambda told: told, False)
assert signals.leave and signals.save
print("alive")
"""


def alone(told: bool) -> bool:
    return told


def test_stop_file_is_found(tmp_path: Path) -> None:
    signals = StopSignals(RunFolder(str(tmp_path)))
    signals.listen(alone, False)
    assert not signals.leave and not signals.save
    (tmp_path / "stop").touch()
    for _ in range(600):
        signals.listen(alone, False)
        if signals.leave:
            break
        time.sleep(0.05)
    assert signals.leave and signals.save
    signals.close()


def test_one_rank_that_heard_speaks_for_all(tmp_path: Path) -> None:
    signals = StopSignals(RunFolder(str(tmp_path)), looks=False)
    signals.listen(lambda told: True, False)  # another rank said so
    assert signals.leave and signals.save


def test_preemption_saves_once_and_trains_on(tmp_path: Path) -> None:
    signals = StopSignals(RunFolder(str(tmp_path)), looks=False)
    heard = []
    for preempted in (False, True, True):
        signals.listen(alone, preempted)
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


def test_second_press_leaves_at_once(tmp_path: Path) -> None:
    left = True
    with pytest.raises(KeyboardInterrupt), Interrupts(RunFolder(str(tmp_path))):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(SAME_PRESS_S + 0.1)
        os.kill(os.getpid(), signal.SIGINT)
        left = False
    assert left
