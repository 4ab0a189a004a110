"""Runs a function in a child process that may hang, crash or run out of memory.

The process is a fresh interpreter (never a fork of a Ray worker, whose threads would not survive one),
kept for the next call. It arms a timer of the kernel's before each call: a decoder that hangs in C is
killed by the alarm, even when nobody is left to watch it. Its heap is bounded by the kernel too.

Not a pool of `pebble` or `multiprocessing`: their children run the parent's main module again (in a Ray
worker, Ray: 1.9 s to start against 0.7 s, measured), and look for code where the parent's path leads.
"""

import ctypes
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from typing import Any

from infra.cluster import CHECKOUT
from pipeline.schema import RowError, Status

START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from pipeline.media.isolate import serve; serve(sys.argv[2])"
)
GRACE_S = 5.0
"""How long after the child's own alarm the parent waits before it kills."""
START_S = 60.0
"""How long a child may take to start."""
CRASH_TRIES = 3
"""Calls of a child that crashes in native code before what it was given is to blame."""
KILL_TRIES = 10
"""Calls of a child that is killed from outside (SIGKILL): an operator or the kernel may have had another
reason, since the child's own memory is bounded; only what is killed each time is to blame."""
START_TRIES = 10
"""Children that may die before their first call; no row is to blame for those."""
MEMORY_BYTES = 4 << 30
"""Heap of a child that decodes; a file that wants more is a row, not a dead worker. Ours."""


class Isolated:
    """One child process, started when first needed."""

    def __init__(self, *, timeout_s: float, memory_bytes: int | None = None) -> None:
        self.timeout_s, self.memory_bytes = timeout_s, memory_bytes or MEMORY_BYTES
        self.child: subprocess.Popen[bytes] | None = None

    def call(self, function: str, *args: Any) -> Any:
        """Call `package.module:name` with picklable arguments and give back what it returns.

        A child that dies is replaced and the call repeated, for it may not have been the call's fault.

        Raises:
            RowError: `TIMEOUT` = it took longer than `timeout_s`; `CRASHED` = the child died each time, of a
                fault in native code, or because the kernel took it for its memory.
            RuntimeError: no child can be started here at all.
            Exception: whatever the function raised, MemoryError included.
        """
        crashes = kills = 0
        while True:
            try:
                return self._call_once(function, args)
            except _Died as death:
                crashes, kills = crashes + (not death.killed), kills + death.killed
                if crashes == CRASH_TRIES or kills == KILL_TRIES:
                    raise RowError(Status.CRASHED, f"{death}, {crashes + kills} times") from None

    def _call_once(self, function: str, args: tuple[Any, ...]) -> Any:
        child = self.child or self._start()
        try:
            _send(child.stdin, (function, args, self.timeout_s))
            good, value = _receive(child.stdout, self.timeout_s + GRACE_S)
        except (EOFError, OSError, TimeoutError) as error:
            raise self._verdict(child, error) from None
        if not good:
            raise value
        return value

    def close(self) -> None:
        if self.child is not None:
            _end(self.child)
            self.child = None

    def _start(self) -> subprocess.Popen[bytes]:
        """A child that has said that it is ready: its start does not count as the call's time."""
        reason: BaseException | None = None
        for _ in range(START_TRIES):
            self.child = child = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(CHECKOUT), str(self.memory_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            try:
                _receive(child.stdout, START_S)
                return child
            except (EOFError, OSError, TimeoutError) as error:
                reason = self._verdict(child, error)
        raise RuntimeError(f"no process for decoding can be started: {reason} ({START_TRIES} tries)")

    def _verdict(self, child: subprocess.Popen[bytes], error: BaseException) -> "RowError | _Died":
        late = isinstance(error, TimeoutError)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0 if late else 2)
        code = child.returncode
        self.close()
        if late or code == -signal.SIGALRM:
            return RowError(Status.TIMEOUT, f"still running after {self.timeout_s:g} s")
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return _Died(f"the process died: {name}", killed=code == -signal.SIGKILL)


class _Died(Exception):
    """One child is gone."""

    def __init__(self, message: str, *, killed: bool) -> None:
        super().__init__(message)
        self.killed = killed


def serve(memory_bytes: str) -> None:
    """The child: answer calls on stdin until it is closed."""
    _die_with_parent()
    limit = int(memory_bytes)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # what libraries print must not reach the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _send(answers, (True, "ready"))
    while True:
        try:
            function, args, timeout_s = _receive(calls, None)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # SIGALRM's default action ends the process
        try:
            module, _, name = function.partition(":")
            answer = (True, getattr(import_module(module), name)(*args))
        except Exception as error:  # noqa: BLE001 - the row boundary: the caller decides
            answer = (False, _portable(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, answer)


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - any class may fail to pickle in its own way
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends; elsewhere a closed stdin does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _send(pipe: Any, value: Any) -> None:
    data = pickle.dumps(value, protocol=5)
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _receive(pipe: Any, timeout_s: float | None) -> Any:
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    (size,) = struct.unpack("<Q", _read(pipe.fileno(), 8, end_s))
    return pickle.loads(_read(pipe.fileno(), size, end_s))


def _read(handle: int, size: int, end_s: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        left_s = None if end_s is None else max(end_s - time.monotonic(), 0)
        if not select.select([handle], [], [], left_s)[0]:
            raise TimeoutError
        chunk = os.read(handle, min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    child.wait()
