"""What a user may not read or write is refused in one line with its cure, before Ray starts."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_numbers import copied, quick_jobs

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import contextlib, io, json, os, sys
from pathlib import Path
from cli import data, train

def run(words, denied, mode, environment):
    place, said = Path(denied), io.StringIO()
    before = place.stat().st_mode
    place.chmod(mode)
    kept = dict(os.environ)
    os.environ.update(environment)
    program, sys.argv = {"vimi-data": data.main, "vimi-train": train.main}[words[0]], words
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            program()
    except SystemExit as end:
        return end.code or 0, said.getvalue()
    except BaseException as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        place.chmod(before)
        os.environ.clear()
        os.environ.update(kept)

for line in sys.stdin:
    print(json.dumps(run(**json.loads(line))), flush=True)
"""
INSPECT = """
import sys
from pipeline.clips.crawl import CrawlConfig, Worker
from pipeline.clips.sources import open_source, read_items, source_from_path

source = source_from_path(sys.argv[1])
worker = Worker(CrawlConfig(sources=(source,), out="out"))
for item in read_items(source, open_source(source)):
    for row in worker.inspect(item.to_json(), {"local_uri": item.uri}):
        print(row["source_uri"].rpartition("/")[2], row["status"], row.get("error"))
worker.close()
"""
NO_RAY = {"RAY_ADDRESS": "", "RAY_TMPDIR": "/dev/null/ray"}
"""Where Ray can't start: a command that comes so far says so."""
COMMANDS = [title for title, _ in quick_jobs()] + ["vimi-train stage1", "vimi-train stage2"]
Run = Callable[..., tuple[int | None, str]]


def as_user() -> list[str]:
    """What stands before a command so that modes of files count for it, also when root runs the tests."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and there is no setpriv to take that away")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command while a file or folder has another mode; (exit code, what it said)."""
    secret = tmp_path_factory.mktemp("secret") / "file"
    secret.touch(mode=0)
    if subprocess.run([*as_user(), "cat", str(secret)], capture_output=True, check=False).returncode == 0:
        pytest.skip("modes of files don't count for this user here")
    child = subprocess.Popen(
        [*as_user(), sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert child.stdin is not None and child.stdout is not None
    asked, told = child.stdin, child.stdout

    def ask(words: list[str], denied: Path, mode: int, **environment: str) -> tuple[int | None, str]:
        case = {"words": words, "denied": str(denied), "mode": mode}
        asked.write(json.dumps(case | {"environment": {**NO_RAY, **environment}}) + "\n")
        asked.flush()
        code, said = json.loads(told.readline())
        return code, said

    yield ask
    asked.close()
    child.wait()


def typed(title: str, values: dict[str, Any], out: Path, folder: Path) -> list[str]:
    """The command with these values in a config file."""
    if "out" in values:
        values = {**values, "out": f"{out}.html" if title.endswith("report") else str(out)}
    place = folder / "config.yaml"
    place.write_text(yaml.safe_dump(json.loads(json.dumps(values, default=str))))
    return [*title.split(), "--config", str(place)]


def places(value: Any) -> Iterator[Path]:
    """Files and folders that config values name."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from places(item) if name != "out" else ()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from places(item)
    elif isinstance(value, str) and value.startswith("/") and Path(value).exists():
        yield Path(value)


def fault(code: int | None, said: str, denied: Path) -> str:
    """What is wrong with how the missing permission is told; empty = nothing."""
    lines = [line for line in said.splitlines() if line.startswith("vimi-") or "Traceback" in line]
    if code == 2 and len(lines) == 1 and "cure:" in said and denied.name in said and "Ray" not in said:
        return ""
    return f"{denied} -> exit {code}: {said[-700:]}"


@pytest.mark.parametrize("title", COMMANDS)
def test_what_may_not_be_read_or_written_is_a_line(
    title: str,
    legal: dict[str, Any],
    tmp_path: Path,
    run: Run,
) -> None:
    values, wrong = copied(legal[title]), []
    for number, place in enumerate(dict.fromkeys(places(values))):
        denied = [place, *(place / name for name in ("certificate.json",) if (place / name).is_file())]
        for file in denied:
            words = typed(title, values, tmp_path / f"out {number}", tmp_path)
            wrong.append(fault(*run(words, file, 0), file))
    if "out" in values:
        locked = tmp_path / "locked"
        locked.mkdir()
        words = typed(title, values, locked / "out", tmp_path)
        wrong.append(fault(*run(words, locked, 0o555), locked))
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.parametrize(
    ("title", "changes", "environment"),
    [
        ("vimi-train evaluate", {"cache": "{locked}/features"}, {}),
        ("vimi-train evaluate", {}, {"XDG_CACHE_HOME": "{locked}"}),
        ("vimi-data crawl", {}, {"RAY_TMPDIR": "{locked}"}),
    ],
)
def test_a_folder_for_what_is_kept_or_passes_through_is_named_too(
    title: str,
    changes: dict[str, Any],
    environment: dict[str, str],
    legal: dict[str, Any],
    tmp_path: Path,
    run: Run,
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()

    def placed(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v.format(locked=locked) if isinstance(v, str) else v for k, v in values.items()}

    words = typed(title, copied(legal[title]) | placed(changes), tmp_path / "out", tmp_path)
    code, said = run(words, locked, 0o555, **placed(environment))
    assert code in (1, 2) and "cure:" in said and "Traceback" not in said, said
    assert len([line for line in said.splitlines() if line.startswith("vimi-")]) == 1
    assert str(locked) in said or "RAY_TMPDIR" in said


def test_a_file_of_a_corpus_that_may_not_be_read_costs_its_row_alone(
    tmp_path: Path,
    run: Run,  # which skips where modes don't count
    write_video: Any,
) -> None:
    corpus = tmp_path / "corpus"
    for seed, name in enumerate(("read.mp4", "secret.mp4")):
        write_video(corpus / name, seed=seed).with_suffix(".txt").write_text("a film")
    (corpus / "secret.mp4").chmod(0)
    done = subprocess.run(
        [*as_user(), sys.executable, "-c", INSPECT, str(corpus)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    read, secret = sorted(done.stdout.splitlines())
    assert read == "read.mp4 ok None"
    assert secret.startswith("secret.mp4 bad_row") and "ermission denied" in secret
