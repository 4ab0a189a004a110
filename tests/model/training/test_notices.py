"""Laws of notices: heard once, agreed on by all, and never a reason to die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from model.training.notices import STOP, Notices

CODE = """
import os, signal
from model.training.notices import Notices, trap_sigterm
trap_sigterm()
notices = Notices({run!r}, looks=False)
notices.listen(lambda told: told, False)
assert not notices.leave
os.kill(os.getpid(), signal.SIGTERM)
notices.listen(lambda told: told, False)
assert notices.leave and notices.save
print("alive")
"""


def alone(told: bool) -> bool:
    return told


def test_stop_file_is_found(tmp_path: Path) -> None:
    notices = Notices(str(tmp_path))
    notices.listen(alone, False)
    assert not notices.leave and not notices.save
    (tmp_path / STOP).touch()
    for _ in range(600):
        notices.listen(alone, False)
        if notices.leave:
            break
        time.sleep(0.05)
    assert notices.leave and notices.save
    notices.close()


def test_one_rank_that_heard_speaks_for_all(tmp_path: Path) -> None:
    notices = Notices(str(tmp_path), looks=False)
    notices.listen(lambda told: True, False)  # another rank said so
    assert notices.leave and notices.save


def test_preemption_saves_once_and_trains_on(tmp_path: Path) -> None:
    notices = Notices(str(tmp_path), looks=False)
    heard = []
    for preempted in (False, True, True):
        notices.listen(alone, preempted)
        heard.append((notices.save, notices.leave))
    assert heard == [(False, False), (True, False), (False, False)]


def test_sigterm_is_a_notice(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", CODE.format(run=str(tmp_path))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "alive" in done.stdout, done.stderr
    assert done.returncode != -signal.SIGTERM
