"""Shared parts of the commands: options, help, the summary at the end.

A command is a function from its words to config fields, declared with the job that it runs:

    @command(app, Job("pipeline.clips.crawl:CrawlConfig", then="vimi-data build-index {c.out} --out memory"))
    def crawl(sources: ..., out: Out = None) -> Fields:
        return {"sources": sources, "out": out}

The job's module is imported when the command runs, so that `--help` answers at once.
"""

import functools
import importlib
import inspect
import shlex
import shutil
import string
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from infra.certificate import Certificate
from infra.cluster import CHECKOUT
from infra.config import Config
from infra.progress import span
from infra.storage import absolute

Fields = dict[str, Any]
"""Dotted config field -> value; None = the command line doesn't say."""
Out = Annotated[str | None, typer.Option("--out", "-o", help="Output folder or URI (s3://, gs://, …).")]

_CONFIG = Annotated[Path | None, typer.Option("--config", help="YAML file with the job's config.")]
_SET = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field below, as in the YAML file; repeat it.", metavar="FIELD=VALUE"),
]
_DRY_RUN = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved config and the plan; start nothing.")
]

PAGE = CHECKOUT / "docs" / "config.md"
"""Every field of every command; `make docs` writes it (cli/reference.py)."""


@dataclass(frozen=True)
class Job:
    """What a command runs."""

    target: str
    """`module:ConfigClass`; the module has `run(config)` and, if it can refuse or plan, `check(config)`."""
    then: str | Callable[[Any], str] = ""
    """The commands to type next, one a line, or a function of the config that gives them; `{c.out}` is a field
    of the config, quoted for the shell."""
    run: str = "run"
    """Name of the module's function."""
    look: str = ""
    """Where to look at what was made, in the same form."""
    bare: Callable[[Any, str], None] | None = None
    """Called with config and plan when there is no --config file: refuses what nobody means by so few words."""
    closing: Callable[[Any], str] | None = None
    """What `run` returned -> the closing words; None = those of a certificate, or none."""

    def load(self, path: Path | None, overrides: list[str] | None, fields: Fields) -> tuple[Any, Config]:
        """The job's module (imported now) and its config."""
        module, _, config_class = self.target.partition(":")
        job = importlib.import_module(module)
        return job, getattr(job, config_class).load(path, overrides=overrides or (), options=fields)


def make_app(help_text: str) -> typer.Typer:
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",  # markdown takes `<image>` for a tag of its own
    )


def command(app: typer.Typer, job: Job, *variants: Job, name: str | None = None) -> Callable[..., Any]:
    """Make a command of a function that returns config fields, with `--config`, `--set` and `--dry-run`.

    `variants` are other jobs that it may run instead; the function then returns (job, fields).
    """

    def declare(words: Callable[..., Fields | tuple[Job, Fields]]) -> Callable[..., None]:
        @functools.wraps(words)
        def run(*, config: Path | None, overrides: list[str] | None, dry_run: bool, **options: Any) -> None:
            said = words(**options)
            chosen, fields = said if isinstance(said, tuple) else (job, said)
            execute(chosen, path=config, overrides=overrides, dry_run=dry_run, fields=fields)

        shared = {"config": (_CONFIG, None), "overrides": (_SET, None), "dry_run": (_DRY_RUN, False)}
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [p.replace(kind=keyword) for p in inspect.signature(words).parameters.values()]
        more = [
            inspect.Parameter(n, keyword, annotation=kind, default=value) for n, (kind, value) in shared.items()
        ]
        run.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *more)}
        run.jobs = (job, *variants)  # type: ignore[attr-defined]
        app.command(name, cls=_WithFields)(run)
        return run

    return declare


class _WithFields(TyperCommand):
    """A command whose help ends with the fields of its config, from docs/config.md."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        print(fields_help(ctx.command_path))


def execute(job: Job, *, path: Path | None, overrides: list[str] | None, dry_run: bool, fields: Fields) -> None:
    """Run one job from its config to its closing words."""
    started_s = time.monotonic()
    module, config = job.load(path, overrides, fields)
    check = getattr(module, "check", None)
    plan = check(config) if check else None
    if job.bare is not None and path is None:
        job.bare(config, str(plan or ""))
    if dry_run:
        print(config.to_yaml().rstrip())
        print(f"# config hash {config.hash()}; nothing was started")
        if isinstance(plan, str):
            print("\n".join(f"# {line}" for line in plan.splitlines()))
        return
    made = getattr(module, job.run)(config)
    if job.closing is not None:
        print(job.closing(made))
    elif isinstance(made, Certificate):
        print(summary(made, getattr(config, "out", ""), time.monotonic() - started_s))
    if job.look:
        print(f"  {quoted(job.look, config)}")
    for line in next_commands(job, config):
        print(f"  next: {line}")


def next_commands(job: Job, config: Any) -> list[str]:
    """The commands to type next."""
    then = job.then if isinstance(job.then, str) else job.then(config)
    return [quoted(line, config) for line in then.splitlines()]


def quoted(text: str, config: Any) -> str:
    """`{c.out}` in the text is a field of the config, short and quoted for the shell."""
    return _Quoted().format(text, c=config)


class _Quoted(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        return shlex.quote(shorten(str(value)))


def summary(certificate: Certificate, out: str, wall_s: float) -> str:
    """A few lines: what was made, what became of the rest, where it lies, and what the job remarks."""
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
    lines += [f"  {remark}" for remark in certificate.facts.get("remarks", ())]
    return "\n".join(lines)


def shorten(uri: str) -> str:
    """Relative to the current folder when it lies below it."""
    here, place = str(Path.cwd()), absolute(uri)
    return place[len(here) + 1 :] if place.startswith(here + "/") else place


def fields_help(command: str) -> str:
    """What the page says of a command's fields, for a terminal."""
    if not PAGE.exists():
        return f"Fields of the config: `make docs` writes {PAGE}"
    width = min(shutil.get_terminal_size().columns, 112)
    lines: list[str] = []
    for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        if title == command or title.startswith(f"{command} --"):
            lines.append(f"Config of {title} (in the file of --config, or --set FIELD=VALUE):\n")
            for name, legal, default, meaning in _rows(body):
                value = f" = {default}" if default not in ("", "-") else ""
                lines.append(f"  {name}  {legal}{value}")
                lines.append(textwrap.fill(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
            lines.append("")
    return "\n".join(lines)


def _rows(body: str) -> Iterator[list[str]]:
    """Cells of the table's rows, without markup."""
    for line in body.splitlines():
        if line.startswith("| `"):
            cells = line.removeprefix("| ").removesuffix(" |").replace("\\|", "\0").split(" | ")
            name, legal, default, meaning = (cell.replace("\0", "|") for cell in cells)
            yield [
                name.strip("`"),
                legal,
                default.strip("`"),
                meaning.replace("*Incidental.*", "(Incidental.)"),
            ]
