"""Laws of what the driver says and does when workers die, or when somebody wants the run to stop."""

import os
import signal
import time
from pathlib import Path

import pytest

from infra.storage import read_json
from model.training.driver import SAME_PRESS_S, Interrupts
from model.training.follow import Follower
from model.training.notices import STOP
from model.training.restarts import note, restarts


def test_what_a_worker_died_of_is_said_once_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path)
    note(run, {1: RuntimeError("of an earlier day")})
    with Follower(run, 100, every_s=0.01):
        note(run, {0: RuntimeError("CUDA error: out of memory\n  in forward"), 3: OSError("gone")})
        time.sleep(0.1)
    said = capsys.readouterr().err
    assert "workers 0, 3 died: RuntimeError: CUDA error: out of memory" in said
    assert said.count("worker") == 1 and "earlier day" not in said and "from 0 samples" in said
    kept = read_json(list(restarts(run))[-1])["errors"]
    assert "in forward" in kept["0"] and kept["3"].startswith("OSError: gone")


def test_one_press_that_arrives_twice_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = False
    with pytest.raises(KeyboardInterrupt), Interrupts(str(tmp_path)):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        saved = True
    assert saved and (tmp_path / STOP).exists()
    assert capsys.readouterr().err.count("stopping after a last checkpoint") == 1


def test_second_press_leaves_at_once(tmp_path: Path) -> None:
    left = True
    with pytest.raises(KeyboardInterrupt), Interrupts(str(tmp_path)):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(SAME_PRESS_S + 0.1)
        os.kill(os.getpid(), signal.SIGINT)
        left = False
    assert left
