"""Why a run should save before its time, or save and leave, as its workers hear of it.

run/stop    written by the driver at Ctrl-C or SIGTERM, or by anyone: save and leave
SIGTERM     to a worker itself, as when its pod is evicted: save and leave
preemption  Ray knows that a node is about to go: save; Ray moves the run when it is gone
"""

import signal
import threading
from collections.abc import Callable

from infra.storage import exists, is_remote, join

STOP = "stop"
_told = threading.Event()


def trap_sigterm() -> None:
    """Note SIGTERM instead of dying of it; to be called in the process's main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _told.set())


class Notices:
    """What the ranks agreed on when they last listened.

    run/stop is looked for in a thread, so that no step waits for storage.

    Args:
        run: folder of the run.
        looks: whether this rank looks for run/stop; one is enough.

    Attributes:
        leave: save and leave.
        save: save now.
    """

    def __init__(self, run: str, *, looks: bool = True) -> None:
        self.place, self.every_s = join(run, STOP), 10.0 if is_remote(run) else 0.5
        self.leave, self.save, self.is_preempted = False, False, False
        self.found, self.closed = threading.Event(), threading.Event()
        if looks:
            threading.Thread(target=self._look, name="notices", daemon=True).start()

    def listen(self, agree: Callable[[bool], bool], preempted: bool) -> None:
        """Come to one mind with the other ranks; all call it alike.

        Args:
            agree: whether any rank says yes.
            preempted: Ray's notice, the same on all ranks; heeded once.
        """
        self.leave = agree(self.found.is_set() or _told.is_set())
        self.save = self.leave or (preempted and not self.is_preempted)
        self.is_preempted |= preempted

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
