"""`vimi-data search MEMORY "a white dog on grass" --image dog.jpg`: a table here, a page of pictures there.

One call answers a batch of queries by the retriever and vectors that `RetrieveConfig` names. Words are compared
exactly, by the shards' postings; vectors by LanceDB's index where the memory has one, else exactly. A filter
comes first in both: ranks are ranks among the documents that pass.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import field_validator

from infra.config import Config
from infra.errors import ConfigError
from infra.pictures import PictureError, decode_picture
from infra.storage import absolute, check_writable, exists, join, read_bytes, write_bytes
from pipeline.memory.retrieve import RETRIEVERS, RetrieveConfig
from pipeline.memory.retrieve.hits import HIT, NOTHING, Hits, by_query, flatten, merge
from pipeline.memory.store import Memory, clip_config, open_memory, require_model
from pipeline.memory.tile import Tiles, ask_all, key_of
from pipeline.memory.vectors import document_vector

if TYPE_CHECKING:
    from infra.clip import Clip

SHOWN = ("text", "image", "source_name", "licence", "split", "source_uri", "start_s")
QUERIES_PER_SCAN, QUERIES_PER_PROBE = 256, 16
"""Queries of one call of LanceDB: an exact scan is shared among them; by an index each query holds its own
candidates in memory, from every segment, and gains nothing by company. Ours."""
CSP = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)
"""Nothing is fetched and no script runs, whatever a document's words are: as in the report's page."""

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; background: #fafafa; color: #222; }
main { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 1rem; }
figure { margin: 0; background: #fff; border-radius: 6px; overflow: hidden; box-shadow: 0 1px 4px #0002; }
figure img { width: 100%; aspect-ratio: 4/3; object-fit: cover; display: block; }
figcaption { padding: .5rem .7rem; } small { color: #777; overflow-wrap: anywhere; }
header img { height: 8rem; border-radius: 6px; }
"""


class Filters(Config):
    """Which documents may be found; empty = all."""

    sources: tuple[str, ...] = ()
    """Names of corpora (`source_name`)."""
    licences: tuple[str, ...] = ()
    """Licences; a document without one is found only without this filter."""
    splits: tuple[str, ...] = ()
    """train, val, test."""

    def where(self) -> str | None:
        """As a SQL condition."""
        named = {"source_name": self.sources, "licence": self.licences, "split": self.splits}
        parts = [f"{column} IN ({', '.join(map(_quoted, names))})" for column, names in named.items() if names]
        return " AND ".join(parts) or None


class SearchConfig(Config):
    """One question to a memory."""

    memory: str
    """Folder made by `vimi-data build-index`."""
    text: str | None = None
    """Words."""
    image: str | None = None
    """Path or URI of a picture; with words, both are averaged (clip, hybrid)."""
    retrieve: RetrieveConfig = RetrieveConfig(retriever="hybrid", k=12)
    """bm25, clip or hybrid; against document, image or text; k."""
    filters: Filters = Filters()
    """Which documents may be found."""
    version: str | None = None
    """Tag of an older version of the memory; None = the newest."""
    out: str | None = None
    """Folder for `search.html`; None = no pictures."""

    @field_validator("retrieve")
    @classmethod
    def _finds_something(cls, value: RetrieveConfig) -> RetrieveConfig:
        if value.k < 1:
            raise ValueError(f"k {value.k}; legal: at least 1")
        return value


@dataclass(frozen=True)
class Query:
    """A question: words, a picture, or both."""

    text: str | None = None
    image: bytes | None = None
    """Encoded picture (JPEG, PNG, ...)."""


@dataclass(frozen=True)
class Hit:
    """One answer."""

    number: int
    """Of the document: see `Memory.take`."""
    rank: int
    """1 = best."""
    score: float
    """bm25: BM25; clip: cosine; hybrid: sum of 1 / (60 + rank)."""


class Searcher:
    """A memory, ready for batches of queries.

    Args:
        memory: from `open_memory`.
        config: retriever and what is compared.
        clip: the memory's own CLIP; needed where the retriever compares vectors.

    Raises:
        ConfigError: a CLIP is missing or is not the memory's.
    """

    def __init__(self, memory: Memory, config: RetrieveConfig, clip: "Clip | None" = None) -> None:
        check_model(memory, config, clip)
        self.memory, self.config, self.clip = memory, config, clip
        self.tiles = Tiles(memory, config.against, kept=len(memory.shards))
        self.where: str | None = None

    def __call__(self, queries: Sequence[Query], filters: Filters | None = None) -> list[list[Hit]]:
        """The `config.k` best documents of each query, best first, without those below `min_score`."""
        method, k = self.config.method, self.config.k
        self._filter(filters.where() if filters else None)
        texts, vectors = [query.text or "" for query in queries], self._vectors(queries)
        depth = max(k, self.config.depth) if method.needs_words and method.needs_vectors else k
        rows = flatten(method.search(self, texts, vectors, depth))
        fused = [method.fuse(own, depth)[:k] for own in by_query(merge([rows], depth), len(queries))]
        return [
            [
                Hit(int(row["doc"]), rank, float(row["score"]))
                for rank, row in enumerate(own, start=1)
                if self.config.is_enough(float(row["score"]))
            ]
            for own in fused
        ]

    def by_words(self, texts: Sequence[str], depth: int) -> list[Hits]:
        """Exactly, by all shards."""
        rows = ask_all(self.tiles, RETRIEVERS["bm25"], texts, np.zeros((len(texts), 0), np.float32), depth)
        return [Hits(own["doc"], own["score"], own["key"]) for own in by_query(rows, len(texts))]

    def by_vectors(self, vectors: np.ndarray, depth: int) -> list[Hits]:
        """By LanceDB."""
        column = f"{self.config.against}_embedding"
        known = self.memory.certificate.facts["indexes"].get(column, {})
        effort, where = known.get("effort"), self.where
        found = nearest(self.memory, self.memory.table, column, vectors, depth, effort=effort, where=where)
        return [hits if vector.any() else NOTHING for hits, vector in zip(found, vectors, strict=True)]

    def take(self, docs: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Columns of the table for these documents."""
        return self.memory.take(docs.tolist(), columns)

    def _filter(self, where: str | None) -> None:
        """Let only documents that pass be found by words; LanceDB filters for itself."""
        if where == self.where:
            return
        self.where = where
        for tile in self.tiles:
            tile.allowed = None
            if where is not None:
                fragment = self.memory.dataset.get_fragment(tile.shard.fragment)
                scan = fragment.scanner(columns=[], filter=where, with_row_address=True).to_table()
                tile.allowed = np.zeros(len(tile), bool)
                tile.allowed[scan["_rowaddr"].to_numpy().astype(np.int64) & 0xFFFFFFFF] = True

    def _vectors(self, queries: Sequence[Query]) -> np.ndarray:
        """The queries' unit vectors, float32 `q d`; a zero row for one that has nothing to embed."""
        if self.clip is None or not self.config.method.needs_vectors:
            return np.zeros((len(queries), 0), np.float32)
        found = np.zeros((len(queries), self.clip.dim), np.float32)
        texts = [i for i, query in enumerate(queries) if query.text and query.text.strip()]
        images = [i for i, query in enumerate(queries) if query.image]
        if images:
            found[images] = self.clip.encode_images([_picture(queries[i].image) for i in images])
        if texts:
            vectors = self.clip.encode_texts([queries[i].text or "" for i in texts])
            both = np.array([i in set(images) for i in texts])
            found[texts] = np.where(both[:, None], document_vector(found[texts], vectors), vectors)
        return found


def check_model(memory: Memory, config: RetrieveConfig, clip: "Clip | None") -> None:
    """Refuse a retriever that compares vectors without the memory's CLIP."""
    if config.method.needs_vectors:
        if clip is None:
            raise ConfigError(f"retriever {config.retriever} needs a CLIP", cure="use bm25, or load one")
        require_model(memory, clip.model_hash, name=clip.name)


def nearest(
    memory: Memory,
    table: Any,
    column: str,
    queries: np.ndarray,
    k: int,
    *,
    effort: Sequence[int] | None = None,
    where: str | None = None,
) -> list[Hits]:
    """The k nearest documents of each query by LanceDB: numbers and cosines, best first.

    Args:
        memory: an open memory.
        table: its LanceDB table.
        column: embedding column.
        queries: float32 `q d`.
        k: answers a query.
        effort: partitions of the index that are read, and times k candidates that are scored again on the
            stored vectors; None = exact, without an index.
        where: SQL filter, applied before the search.
    """
    first = np.zeros(1 + max(shard.fragment for shard in memory.shards), np.int64)
    first[[shard.fragment for shard in memory.shards]] = [shard.first for shard in memory.shards]
    answers: list[Hits] = []
    lot = QUERIES_PER_SCAN if effort is None else QUERIES_PER_PROBE
    for start in range(0, len(queries), lot):
        chunk = list(queries[start : start + lot])
        asked = chunk * 2 if len(chunk) == 1 else chunk  # LanceDB numbers the answers of two queries and more
        query = table.search(asked, vector_column_name=column).distance_type("cosine").with_row_id(True)
        query = (
            query.bypass_vector_index() if effort is None else query.nprobes(effort[0]).refine_factor(effort[1])
        )
        query = query.where(where, prefilter=True) if where else query
        found = query.limit(k).select(["doc_id", "_distance"]).to_arrow()
        address = found["_rowid"].to_numpy().astype(np.int64)
        rows = np.zeros(len(found), HIT)
        rows["query"], rows["score"] = found["query_index"].to_numpy(), 1.0 - found["_distance"].to_numpy()
        rows["doc"] = first[address >> 32] + (address & 0xFFFFFFFF)
        rows["key"] = [key_of(doc_id) for doc_id in found["doc_id"].to_pylist()]
        answers += [
            Hits(own["doc"], own["score"], own["key"]) for own in by_query(merge([rows], k), len(chunk))
        ]
    return answers


def check(config: SearchConfig) -> None:
    """Raise ConfigError for what can be refused before a model is loaded."""
    if not (config.text and config.text.strip()) and not config.image:
        raise ConfigError("nothing to search for", legal="words, --image, or both")
    if config.image and not config.text and not config.retrieve.method.needs_vectors:
        compares = f"{config.retrieve.retriever} compares words"
        raise ConfigError(f"{compares}, the query is a picture", cure="--retriever clip")
    if config.image and not exists(absolute(config.image)):
        raise ConfigError(f"no picture at {config.image}")
    if config.out:
        check_writable(absolute(config.out))
    open_memory(config.memory, version=config.version)


def run(config: SearchConfig) -> list[dict[str, Any]]:
    """Answer, print the table, write the pictures; returns the rows of the table."""
    check(config)
    memory = open_memory(config.memory, version=config.version)
    clip = load_memory_clip(memory) if config.retrieve.method.needs_vectors else None
    query = Query(config.text, read_bytes(absolute(config.image)) if config.image else None)
    hits = Searcher(memory, config.retrieve, clip)([query], config.filters)[0]
    rows = _rows(memory, hits)
    _print(rows, config, memory)
    if config.out:
        out, title = absolute(config.out), config.text or config.image or ""
        write_bytes(join(out, "search.html"), picture_page(title, rows, query.image))
        print(f"  pictures: {join(out, 'search.html')}")
    return rows


def load_memory_clip(memory: Memory) -> "Clip":
    """The CLIP that the memory was built with, as its own config names it.

    Raises:
        ConfigError: the memory doesn't say, or that model can't be loaded.
    """
    from infra.clip import load_clip

    return load_clip(clip_config(memory), "cpu")


def _rows(memory: Memory, hits: list[Hit]) -> list[dict[str, Any]]:
    found = memory.take([hit.number for hit in hits], SHOWN).to_pylist()
    return [{"rank": hit.rank, "score": hit.score, **row} for hit, row in zip(hits, found, strict=True)]


def _print(rows: list[dict[str, Any]], config: SearchConfig, memory: Memory) -> None:
    from rich.console import Console
    from rich.table import Table

    how, by_vectors = config.retrieve.retriever, config.retrieve.method.needs_vectors
    how += f" against {config.retrieve.against}" if by_vectors else ""
    if not rows:
        cause = "none passes" if by_vectors else "none shares a word with the question"
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


def _picture(data: bytes | None) -> Any:
    try:
        return decode_picture(data or b"")
    except PictureError as error:
        raise ConfigError(f"the query's picture can't be read: {error}", legal="JPEG, PNG, WebP, ...") from None


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def picture_page(title: str, rows: Sequence[dict[str, Any]], query_image: bytes | None) -> bytes:
    """One self-contained HTML file; all text of the documents is escaped."""
    asked = f'<p><img alt="the query" src="{_data_uri(query_image)}"></p>' if query_image else ""
    figures = "\n".join(_figure(row) for row in rows) or "<p>Nothing was found.</p>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{CSP}<title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><body><header><h1>{html.escape(title)}</h1>{asked}</header>"
        f"<main>\n{figures}\n</main></body></html>\n"
    ).encode()


def _figure(row: dict[str, Any]) -> str:
    text, source = html.escape(row["text"] or ""), html.escape(row["source_uri"] or "")
    licence = f" · {html.escape(row['licence'])}" if row.get("licence") else ""
    return (
        f'<figure><img alt="{text}" src="{_data_uri(row["image"])}"><figcaption><b>{row["rank"]}</b> {text}'
        f"<br><small>{row['score']:.4f} · {source}{licence}</small></figcaption></figure>"
    )


def _data_uri(image: bytes | None) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(image or b"").decode()
