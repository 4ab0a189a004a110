"""docs/config.md: every field of every command's config, made from the classes; `make docs` writes it.

`vimi-data COMMAND --help` prints its section of that page, because importing the class would import its job.
A test holds the page in step with the classes.
"""

import importlib
import json
import re
from collections.abc import Iterator
from typing import Any

from cli import data, train
from cli.common import PAGE
from infra.config import Config, is_incidental
from infra.fields import ConfigField, walk

INTRO = """# Config fields

Made by `make docs` from the docstrings of the config classes; don't edit it by hand.

Every command reads `--config FILE.yaml`, then its own options, then `--set field=value`; the later wins. A
dotted name is a field of a group: `fetch.max_tries` is `fetch: {max_tries: ...}` in the file; `sources[].kind`
is a field of each item of a list. A default of `-` means that the field must be set. *Incidental* fields say
only where or how fast a job runs: they may differ when it is continued.
"""
HEAD = "| field | legal | default | meaning |\n|---|---|---|---|\n"


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")
    print(f"written: {PAGE}")


def render() -> str:
    """The whole page."""
    parts = [INTRO]
    for title, target in jobs():
        rows = "".join(row(field) for field in walk(config_class(target)))
        parts.append(f"## {title}\n\nModule `{target.partition(':')[0]}`.\n\n{HEAD}{rows}")
    return "\n".join(parts)


def jobs() -> Iterator[tuple[str, str]]:
    """(command as typed, `module:ConfigClass`) of every command that has a config."""
    for program, app in (("vimi-data", data.app), ("vimi-train", train.app)):
        for command in app.registered_commands:
            name = command.name or getattr(command.callback, "__name__", "")
            for job in getattr(command.callback, "jobs", ()):
                yield f"{program} {name}", job.target


def config_class(target: str) -> type[Config]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def row(field: ConfigField) -> str:
    meaning = re.sub(r"\bNone\b", "null", field.meaning)  # as YAML says it
    if is_incidental(field.info):
        meaning += " *Incidental.*"
    cells = [f"`{field.name}`", field.legal, default_text(field), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def default_text(field: ConfigField) -> str:
    """As YAML would say it; a group's defaults stand in the rows of its fields."""
    if field.is_required:
        return "-"
    if field.group is not None and field.default not in (None, ()):
        return ""
    return f"`{json.dumps(field.default, default=_plain, ensure_ascii=False)}`"


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Config) else str(value)


if __name__ == "__main__":
    main()
