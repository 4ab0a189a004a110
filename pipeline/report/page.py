"""The template: everything is escaped, nothing is fetched."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

FOLDER = Path(__file__).parent


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html")


def render(values: dict[str, Any]) -> str:
    """The page as text; `values` are what `pipeline.report.job.gather` makes."""
    style = Markup((FOLDER / "style.css").read_text(encoding="utf-8"))
    return _template().render(style=style, **values)
