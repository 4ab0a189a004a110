"""Stop signals at drawn moments: a line and an exit code, nothing left running, and the same bytes later."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.errors import STOPPED
from infra.certificate import CERTIFICATE, read_certificate
from pipeline.memory import open_memory
from tests.cli.test_numbers import copied, quick_jobs
from tests.pipeline.world.test_evidence import make_judged

ROOT = Path(__file__).resolve().parents[2]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
MAKING = [
    *("world", "crawl", "redrive", "caption", "build-index", "augment", "benchmark", "subjects", "instruct"),
    *("encode", "judge", "report", "sample", "evaluate", "export"),
]
"""Commands that make something, but for the trainings, which have laws of their own."""
PATIENCE_S = 240
GONE_WITHIN_S = 90
"""How long what Ray has started may outlive its driver: a worker that still starts notices late."""


class Command:
    """A command in a process group of its own, as a terminal starts it; all below it bear its mark."""

    def __init__(self, title: str, values: dict[str, Any], folder: Path) -> None:
        self.folder, self.mark, self.log = folder, uuid.uuid4().hex, folder / "log"
        (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
        program, name = title.split()
        # Who starts the tests may ignore SIGINT, and what they start would too.
        heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{heard}; from cli.{program.removeprefix('vimi-')} import main; main()"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, name, "--config", str(folder / "config.yaml")],
                env=environment | {"VIMI_TEST_MARK": self.mark, "XDG_CACHE_HOME": str(folder / "cache")},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_it_listens(self) -> float:
        """The time at which it has its own way with SIGTERM: before, Python itself still starts."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and not catches(self.process.pid, signal.SIGTERM):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        return time.monotonic()

    def finish(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def stop(self, number: signal.Signals) -> None:
        """As a terminal does it, to the whole group; or as a scheduler does, to the process."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def left(self) -> list[str]:
        """Command lines of the processes that it has started and left, once they had time to go."""
        deadline_s = time.monotonic() + GONE_WITHIN_S
        while (found := list(marked(self.mark))) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return found


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line for line in lines if line.startswith("SigCgt:")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


def marked(mark: str) -> Iterator[str]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    yield (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue


def contents(out: Path) -> dict[str, Any]:
    """What a file, a folder or a memory holds, without times and Lance's drawn names."""
    if out.is_file():
        return {"": out.read_bytes()}
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if CERTIFICATE in found:
        certificate = read_certificate(out)
        assert certificate is not None
        if certificate.job == "build-index":
            return documents(out)
        found[CERTIFICATE] = certificate.content_hash().encode()
    return found


def documents(out: Path) -> dict[str, Any]:
    """A memory's rows and arrays: Lance's own files have drawn names."""
    memory = open_memory(str(out))
    columns = ["doc_id", "text", "image", "phash", "source_uri"]
    rows = memory.take(range(memory.num_documents), columns).to_pylist()
    arrays = {path.name: path.read_bytes() for path in sorted((out / "shards").rglob("*.arrow"))}
    return {"rows": rows, "arrays": arrays, "top": sorted(path.name for path in out.iterdir())}


def broken_and_whole(title: str, values: dict[str, Any], folder: Path, number: signal.Signals) -> None:
    """Run a command, stop it at a drawn moment of its life, and run it again, into the same place."""
    out, whole, draw = Path(values["out"]), folder / "whole", random.Random(f"{title} {number}")
    command = Command(title, values, folder)
    started_s = command.wait_until_it_listens()
    assert command.finish() == 0, command.log.read_text()[-2000:]
    wall_s = time.monotonic() - started_s
    shutil.move(out, whole)
    while True:
        command = Command(title, values, folder)
        command.wait_until_it_listens()
        time.sleep(wall_s * draw.random())
        if command.process.poll() is None:
            command.stop(number)
        code, said = command.finish(), command.log.read_text()
        if code == CODES[number]:
            break
        assert code in (0, -number), f"exit {code}: {said[-2000:]}"
        wall_s *= 0.9  # it was done before: all said, and perhaps on its way out
        delete(out)
    assert "Traceback" not in said and said.rstrip().endswith(STOPPED), said[-3000:]
    assert not command.left()
    again = Command(title, values, folder)
    assert again.finish() == 0, again.log.read_text()[-2000:]
    assert contents(out) == contents(whole)
    assert not again.left()


def delete(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def own(legal: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Command -> values with which it makes something."""
    folder = tmp_path_factory.mktemp("judged")
    made = make_judged(folder, 4)
    claim = {"words": "it is so", "measure": "colour", "of": "right", "at_least": 0.5}
    small = {"out": "", "nouns": 12, "unseen": 2}
    return copied(legal) | {"vimi-data judge": {**made.config, "claims": [claim]}, "vimi-data world": small}


CASES = [(name, number) for name in MAKING for number in CODES]
SHORT = [("world", signal.SIGINT), ("benchmark", signal.SIGTERM)]
"""Of the default suite: they start no Ray."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "number"),
    [pytest.param(*case, marks=[] if case in SHORT else pytest.mark.slow) for case in CASES],
    ids=[f"{name}-{number.name}" for name, number in CASES],
)
def test_a_stopped_command_ends_in_the_same_bytes_and_leaves_nothing_behind(
    name: str, number: signal.Signals, own: dict[str, Any], tmp_path: Path
) -> None:
    title = next(title for title in own if title.split()[1] == name)
    out = "out.html" if name == "report" else "out"
    values = {**own[title], "out": str(tmp_path / out)}
    broken_and_whole(title, values, tmp_path, number)


def test_every_command_that_makes_something_is_stopped_here() -> None:
    looking = {"search", "plan", "validate"}
    assert {title.split()[1] for title, _ in quick_jobs()} == {*MAKING, *looking}


STRANGE = """
import atexit, os, signal, sys
from cli.errors import answer
number = signal.Signals(int(sys.argv[1]))

def raises_its_own():
    try:
        signal.raise_signal(number)
    except (KeyboardInterrupt, SystemExit):
        raise AttributeError("partially initialized module") from None

def aborts_at_the_end():
    atexit.register(lambda: None)
    sys.stopped = type("Ray", (), {"__del__": lambda self: os.abort()})()
    signal.raise_signal(number)

def is_imported():
    sys.path.insert(0, sys.argv[3])
    import stopped_module
    assert stopped_module.WHOLE
    signal.pause()

answer("vimi-data", globals()[sys.argv[2]])
"""
"""A process that gets its signal at a bad moment of a library's."""


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("moment", ["raises_its_own", "aborts_at_the_end", "is_imported"])
def test_a_stop_at_a_bad_moment_is_a_stop(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    module = f"import signal\nsignal.raise_signal({int(number)})\nWHOLE = True\n"
    (tmp_path / "stopped_module.py").write_text(module)
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heard}\n{STRANGE}", str(int(number)), moment, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (CODES[number], "")
    assert done.stderr == f"vimi-data: {STOPPED}\n"
