"""`vimi-data search MEMORY "a white dog on grass" --image dog.jpg`: a table here, a page of pictures there."""

from typing import TYPE_CHECKING, Any

from pydantic import Field

from infra.clip import ClipConfig
from infra.config import Config
from infra.errors import ConfigError
from infra.storage import absolute, check_writable, exists, join, read_bytes, read_json, write_bytes
from pipeline.memory import Memory, open_memory
from pipeline.memory.retrieve.config import RetrieveConfig
from pipeline.memory.search.engine import Filters, Hit, Query, Searcher
from pipeline.memory.search.page import picture_grid, picture_page

if TYPE_CHECKING:
    from infra.clip import Clip

SHOWN = ("text", "image", "source_name", "licence", "split", "source_uri", "start_s")


class SearchConfig(Config):
    """One question to a memory."""

    memory: str
    """Folder made by `vimi-data build-index`."""
    text: str | None = None
    """Words."""
    image: str | None = None
    """Path or URI of a picture; with words, both are averaged (clip, hybrid)."""
    retrieve: RetrieveConfig = RetrieveConfig(retriever="hybrid", k=12)
    """bm25, clip or hybrid; against document, image or text; k and weights."""
    clip: str | None = None
    """Name or hash of one of the memory's CLIPs (`build-index --add-clip`); None = the first."""
    filters: Filters = Filters()
    """Which documents may be found."""
    version: str | None = None
    """Tag of an older version of the memory; None = the newest."""
    out: str | None = None
    """Folder for `search.html` and `search.png`; None = no pictures."""
    columns: int = Field(default=4, ge=1, le=12)
    """Pictures side by side."""


def check(config: SearchConfig) -> None:
    """Raise ConfigError for what can be refused before a model is loaded."""
    if not (config.text and config.text.strip()) and not config.image:
        raise ConfigError("nothing to search for", legal="words, --image, or both")
    if config.image and not config.text and config.retrieve.retriever == "bm25":
        raise ConfigError("bm25 compares words, the query is a picture", cure="--retriever clip")
    if config.image and not exists(absolute(config.image)):
        raise ConfigError(f"no picture at {config.image}")
    if config.out:
        check_writable(absolute(config.out))
    open_memory(config.memory, version=config.version)


def run(config: SearchConfig) -> list[dict[str, Any]]:
    """Answer, print the table, write the pictures; returns the rows of the table."""
    check(config)
    memory = open_memory(config.memory, version=config.version)
    clip = None if config.retrieve.retriever == "bm25" else load_memory_clip(memory, config.clip)
    query = Query(config.text, read_bytes(absolute(config.image)) if config.image else None)
    hits = Searcher(memory, config.retrieve, clip)([query], config.filters)[0]
    rows = _rows(memory, hits)
    _print(rows, config, memory)
    if config.out:
        out, title = absolute(config.out), config.text or config.image or ""
        write_bytes(join(out, "search.html"), picture_page(title, rows, query.image, columns=config.columns))
        write_bytes(join(out, "search.png"), picture_grid(rows, columns=config.columns))
        print(f"  pictures: {join(out, 'search.html')}")
    return rows


def load_memory_clip(memory: Memory, name: str | None = None, *, device: str = "cpu") -> "Clip":
    """A CLIP that embedded the memory, as its own config names it.

    Args:
        memory: an open memory.
        name: name or hash of one that was added; None = the first.
        device: where it computes.

    Raises:
        ConfigError: the memory doesn't say, or that model can't be loaded.
    """
    from infra.clip import load_clip

    place = join(memory.uri, "job.json")
    if not exists(place):
        raise ConfigError(f"{memory.uri} doesn't name its CLIP", cure="give the clip in the config")
    configs = {"": read_json(place)["config"]["clip"]}
    added = memory.certificate.facts.get("clips", {})
    configs |= {model_hash: model["config"] for model_hash, model in added.items()}
    found = [c for h, c in configs.items() if name is None or c["name"] == name or (h and h.startswith(name))]
    if not found:
        raise ConfigError(
            f"no CLIP {name!r} in {memory.uri}", legal=", ".join(c["name"] for c in configs.values())
        )
    return load_clip(ClipConfig.model_validate(found[0]), device)


def _rows(memory: Memory, hits: list[Hit]) -> list[dict[str, Any]]:
    found = memory.rows([hit.doc_id for hit in hits], SHOWN).to_pylist()
    return [{"rank": hit.rank, "score": hit.score, **row} for hit, row in zip(hits, found, strict=True)]


def _print(rows: list[dict[str, Any]], config: SearchConfig, memory: Memory) -> None:
    from rich.console import Console
    from rich.table import Table

    how = config.retrieve.retriever
    how += f" against {config.retrieve.against}" if how != "bm25" else ""
    if not rows:
        cause = "none shares a word with the question" if config.retrieve.retriever == "bm25" else "none passes"
        print(f"nothing found among {memory.num_documents:,} documents ({how}): {cause}")
        return
    table = Table(title=f"{len(rows)} of {memory.num_documents:,} documents, {how}", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("score", justify="right")
    table.add_column("text", ratio=1)
    table.add_column("source", overflow="fold")
    for row in rows:
        place = (row["source_uri"] or "").rsplit("/", 1)[-1]
        place += f" at {row['start_s']:.1f} s" if row["start_s"] else ""
        table.add_row(str(row["rank"]), f"{row['score']:.4f}", _plain(row["text"] or ""), _plain(place))
    Console().print(table)


def _plain(text: str) -> Any:
    """Text of a stranger: no markup, no control characters on the terminal."""
    from rich.text import Text

    shown = "".join(c if c.isprintable() else " " for c in text)
    return Text(shown if len(shown) <= 160 else shown[:157] + "...")
