"""`vimi-data report`: one HTML file that works offline and can be sent to a colleague.

Every part is optional but one: a page about a crawl alone is as good as one about a whole run. Reads
only certified outputs, changes nothing, starts no Ray.
"""

from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from infra.certificate import require_certificate
from infra.errors import ConfigError
from infra.samples import SAMPLES
from infra.storage import absolute, check_writable, exists, join, write_bytes
from pipeline.report.album import Album
from pipeline.report.crops import subjects_part
from pipeline.report.galleries import clip_cards, instruction_cards, prompt_cards, sample_cards
from pipeline.report.provenance import fates, next_steps, provenance, retrieval, summary
from pipeline.report.read import EVIDENCE, Parts, ReportConfig, previews, read_parts
from pipeline.report.scores import scores_part
from pipeline.report.statistics import (
    distributions,
    document_tables,
    kept_tables,
    loss_charts,
    score_tables,
    task_tables,
)

FOLDER, PAGE, TITLE = Path(__file__).parent, "report.html", "From corpus to video"
NUM_STRIPS = 6
"""Rows of film strips that the page opens with; the page of `vimi-data judge` has more."""


def check(config: ReportConfig) -> None:
    """Refuse what can't be shown.

    Raises:
        ConfigError: nothing to report, an uncertified folder, a run or sample folder without results, or
            a page that can't be written.
    """
    one = [config.clips, config.memory, config.prompts, config.crops, config.instructions]
    if not any([*one, config.runs, config.samples, config.scores, config.evidence]):
        raise ConfigError(
            "nothing to report",
            legal="one or more of clips, memory, prompts, crops, instructions, runs, samples, scores, evidence",
            cure="--clips FOLDER, or any other output",
        )
    for folder, job in [
        (config.clips, "crawl"),
        (config.memory, "build-index"),
        (config.prompts, "augment"),
        (config.crops, "subjects"),
        (config.instructions, "instruct"),
    ]:
        if folder is not None:
            require_certificate(folder, job=job, made_by=f"vimi-data {job}")
    for folder in config.runs:
        _require_file(folder, "metrics.jsonl", "vimi-train stage1")
    for folder in config.samples:
        _require_file(folder, SAMPLES, "vimi-train sample")
    for folder in config.scores:
        require_certificate(folder, job="evaluate", made_by="vimi-train evaluate")
    if config.evidence is not None:
        _require_file(config.evidence, EVIDENCE, "vimi-data judge")
    check_writable(str(PurePosixPath(page_path(config)).parent))


def _require_file(folder: str, name: str, made_by: str) -> None:
    if not exists(join(absolute(folder), name)):
        raise ConfigError(f"no {name} in {folder}", cure=f"give the output of `{made_by}`")


def page_path(config: ReportConfig) -> str:
    out = absolute(config.out)
    return out if out.endswith((".html", ".htm")) else join(out, PAGE)


def run(config: ReportConfig) -> str:
    """Write the page.

    Returns:
        Its path.

    Raises:
        ConfigError: see `check`.
    """
    check(config)
    parts = read_parts(config)
    strips = (parts.evidence or {}).get("strips", [])[:NUM_STRIPS]
    rest = 150_000 + len(str(strips))  # for words and charts, and what comes as pictures already
    album = Album(max_bytes=config.max_bytes - rest)
    page = render(gather(config, parts, album))
    place = page_path(config)
    write_bytes(place, page.encode())
    return place


def gather(config: ReportConfig, parts: Parts, album: Album) -> dict[str, Any]:
    """Everything that the template needs; the order is the order of the pictures' claim to space."""
    shards = [found for found in (parts.instructions, parts.prompts) if found]
    videos = [sample_cards(folder, shards, album) for folder in config.samples]
    videos += [
        sample_cards(folder, shards, album, label=label)
        for run in parts.runs
        for label, folder in previews(run)
    ]
    return {
        "title": TITLE,
        "evidence": parts.evidence,
        "num_strips": NUM_STRIPS,
        "summary": summary(parts),
        "fates": fates(parts),
        "samples": [card for cards in videos for card in cards],
        "scores": scores_part(parts.evaluations, album),
        "prompts": prompt_cards(parts.prompts, album),
        "retrieval": retrieval(parts),
        "instructions": instruction_cards(parts.instructions, album),
        "subjects": subjects_part(parts, album),
        "clips": clip_cards(config.clips, album),
        "losses": loss_charts(parts.runs),
        "documents": document_tables(parts.runs),
        "tasks": task_tables(parts.runs),
        "kept": kept_tables(parts.runs),
        "trained_scores": score_tables(parts.runs),
        "distributions": distributions(parts),
        "provenance": provenance(parts),
        "next_steps": next_steps(config, parts),
        "left_out": album.left_out,
        "max_bytes": config.max_bytes,
    }


def render(values: dict[str, Any]) -> str:
    """The page as text: everything is escaped, nothing is fetched; `values` are what `gather` makes."""
    style = Markup((FOLDER / "style.css").read_text(encoding="utf-8"))
    return _template().render(style=style, **values)


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
