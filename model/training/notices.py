"""Why a run should save and leave before its end, as one worker sees it.

    run/stop    written by the driver at Ctrl-C or SIGTERM, and by anyone else who wants the run to stop
    SIGTERM     to the worker itself, as when its pod is evicted

Both are only noted; all ranks agree on it between two steps (`Training.agree`), save and leave together.
"""

import signal
import threading

from infra.storage import exists, is_remote, join

STOP = "stop"
_told = threading.Event()


def trap_sigterm() -> None:
    """Note SIGTERM instead of dying of it; to be called in the process's main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _told.set())


class Notices:
    """Looks for run/stop in a thread of its own, so that no step waits for storage.

    Args:
        run: folder of the run.
        looks: whether this rank looks; one is enough.
        every_s: seconds between two looks; None = 1 s on local disks, 10 s in object stores.
    """

    def __init__(self, run: str, *, looks: bool = True, every_s: float | None = None) -> None:
        self.place = join(run, STOP)
        self.every_s = every_s or (10.0 if is_remote(run) else 1.0)
        self.found, self.closed = threading.Event(), threading.Event()
        if looks:
            threading.Thread(target=self._look, name="notices", daemon=True).start()

    @property
    def leave(self) -> bool:
        """Whether this rank has heard that it should leave."""
        return self.found.is_set() or _told.is_set()

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
