"""Stop signals: save now, or save and leave (SIGTERM, time limit, file), from the driver to the workers.

run/stop    written by the driver at Ctrl-C or SIGTERM, or by anyone: save and leave
SIGTERM     to a worker itself, as when its pod is evicted: save and leave
preemption  Ray knows that a node is about to go: save; Ray moves the run when it is gone
"""

import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from infra.errors import EXIT_TERMINATED
from infra.progress import say
from infra.run_folder import RunFolder
from infra.storage import exists, is_remote, write_bytes

_told = threading.Event()
SAME_PRESS_S = 1.0
"""Signals so close together are one: what stands between a terminal and us (make, timeout, uv) often passes
Ctrl-C on to a process that the terminal has told already."""


def trap_sigterm() -> None:
    """Note SIGTERM instead of dying of it; to be called in the process's main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _told.set())


class ToldToLeave(Exception):
    """Raised within a look at the training, so that it ends early."""


class StopSignals:
    """What the ranks agreed on when they last listened.

    run/stop is looked for in a thread, so that no step waits for storage.

    `agree` tells whether any rank says yes, and all ranks call it alike; one rank that `looks` for run/stop is
    enough.

    Attributes:
        leave: save and leave.
        save: save now.
    """

    def __init__(self, run: RunFolder, agree: Callable[[bool], bool], *, looks: bool = True) -> None:
        self.agree, self.place, self.every_s = agree, run.stop, 10.0 if is_remote(run.uri) else 0.5
        self.leave = self.save = self.notice = self.is_preempted = False
        self.found, self.closed = threading.Event(), threading.Event()
        if looks:
            threading.Thread(target=self._look, name="stop-signals", daemon=True).start()

    def heed(self, preempted: bool) -> None:
        """Ray's notice that a node is about to go, the same on all ranks; the first one counts."""
        self.notice = preempted and not self.is_preempted
        self.is_preempted |= preempted

    def listen(self) -> None:
        """Come to one mind with the other ranks; all call it alike."""
        self.leave = self.leave or self.agree(self.found.is_set() or _told.is_set())
        self.save, self.notice = self.leave or self.notice, False

    def close(self) -> None:
        self.closed.set()

    def _look(self) -> None:
        while True:
            try:
                if exists(self.place):
                    self.found.set()
                    return
            except OSError:  # a store that is away for a moment says nothing
                pass
            if self.closed.wait(self.every_s):
                return


class Interrupts(AbstractContextManager["Interrupts"]):
    """The first Ctrl-C or SIGTERM asks the workers to save and leave, like run/stop; the second leaves at once,
    unless the run has no checkpoint yet: then the third does.

    Raises:
        KeyboardInterrupt: at the end, if the run was asked to leave; or at that signal.
        SystemExit: the same, asked by SIGTERM.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.place, self.asked_s, self.warned = run, run.stop, math.inf, False
        self.before: dict[int, Any] = {}
        self.end: BaseException = KeyboardInterrupt()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is None and (self.asked_s < math.inf or exists(self.place)):
            if (last := self.run.latest_checkpoint()) is not None:
                say(f"  the last checkpoint: {last}")
            raise self.end

    def _ask(self, number: int, _: object) -> None:
        now_s = time.monotonic()
        if number == signal.SIGTERM:
            self.end = SystemExit(EXIT_TERMINATED)
        if now_s > self.asked_s + SAME_PRESS_S:
            if self.warned or self.run.positions():
                raise self.end
            self.warned, self.asked_s = True, now_s
            say("  the first checkpoint is not written yet; once more to leave without one")
        if self.asked_s < math.inf:
            return
        self.asked_s = now_s
        say("  stopping after a last checkpoint; once more to leave at once")
        write_bytes(self.place, b"")
