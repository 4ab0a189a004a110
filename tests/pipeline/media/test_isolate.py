"""A call that hangs, crashes or wants too much memory costs itself and nothing else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.media.isolate import Isolated
from pipeline.schema import RowError, Status


@pytest.fixture
def child() -> Iterator[Isolated]:
    isolated = Isolated(timeout_s=1.0, memory_bytes=1 << 30)
    yield isolated
    isolated.close()


def test_values_and_errors_come_back(child):
    assert child.call("math:hypot", 3.0, 4.0) == 5.0
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        child.call("math:sqrt", -1.0)
    assert child.call("builtins:len", b"x" * 5_000_000) == 5_000_000


def test_a_rows_fate_crosses_the_processes(child):
    with pytest.raises(RowError, match="0 bytes") as caught:
        child.call("pipeline.media.frames:probe", b"")
    assert caught.value.status is Status.EMPTY


def test_the_same_process_serves_the_next_call(child):
    assert child.call("os:getpid") == child.call("os:getpid")


def test_a_hang_costs_its_time_out_and_the_next_call_works(child):
    started = time.monotonic()
    with pytest.raises(RowError, match="1 s") as caught:
        child.call("time:sleep", 60)
    assert caught.value.status is Status.TIMEOUT
    assert time.monotonic() - started < 5
    assert child.call("math:floor", 1.5) == 1


def test_a_hang_in_native_code_is_killed_too(child, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RowError, match="still running"):
        child.call("builtins:open", str(tmp_path / "pipe"))  # blocks in the kernel for ever


def test_a_crash_is_told_by_its_signal_and_the_next_call_works(child):
    with pytest.raises(RowError, match="SIGABRT") as caught:
        child.call("os:abort")
    assert caught.value.status is Status.CRASHED
    assert child.call("math:floor", 1.5) == 1


def test_memory_is_bounded_by_the_kernel(child):
    with pytest.raises(MemoryError):
        child.call("builtins:bytearray", 4 << 30)
    assert child.call("math:floor", 1.5) == 1


def test_what_libraries_print_does_not_reach_the_answers(child):
    assert child.call("builtins:print", "noise") is None
    assert child.call("os:write", 1, b"raw noise") == 9
    assert child.call("math:floor", 2.5) == 2


def test_the_child_does_not_outlive_a_killed_parent(tmp_path):
    code = (
        "from pipeline.media.isolate import Isolated\n"
        "c = Isolated(timeout_s=60, memory_bytes=1 << 30)\n"
        "print(c.call('os:getpid'), flush=True)\n"
        "c.call('time:sleep', 50)\n"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def test_a_folder_of_the_user_cannot_shadow_the_child(tmp_path, monkeypatch):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    isolated = Isolated(timeout_s=5, memory_bytes=1 << 30)
    assert isolated.call("pipeline.media.frames:clip_times", 0.0, 2.0, 1) == [1.0]
    isolated.close()


KILLED_UNTIL_FOURTH = """
import os, signal, sys
def act(log):
    with open(log, "a") as file:
        file.write("x")
    if os.path.getsize(log) < 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"
"""


def test_kills_from_outside_are_not_the_files_fault(child, tmp_path, monkeypatch):
    """A node under memory pressure or an operator may kill a child more often than a bad file would."""
    (tmp_path / "unlucky.py").write_text(KILLED_UNTIL_FOURTH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert child.call("unlucky:act", str(tmp_path / "log")) == "done"
    assert (tmp_path / "log").read_text() == "xxxx"


def test_a_child_killed_while_it_starts_is_started_again(child):
    import threading

    done = threading.Event()

    def killer() -> None:
        while not done.is_set():
            if child.child is not None and deaths:
                deaths.pop()
                child.child.kill()
            time.sleep(0.002)

    deaths = [1, 2, 3]
    thread = threading.Thread(target=killer)
    thread.start()
    try:
        assert child.call("math:floor", 1.5) == 1
    finally:
        done.set()
        thread.join()
