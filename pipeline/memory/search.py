"""`vimi-data search MEMORY "a white dog on grass" --image dog.jpg`: a table here, a page of pictures there.

One call answers a batch of queries by the retriever and vectors that `RetrieveConfig` names. Small and middling
memories are answered exactly from arrays, those beyond by LanceDB's indexes with the settings whose recall the
certificate proves. A filter comes first in both: ranks are ranks among the documents that pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.config import Config
from infra.errors import ConfigError
from infra.pictures import PictureError, decode_picture
from infra.storage import absolute, check_writable, exists, join, read_bytes, write_bytes
from pipeline.memory import Memory, model_column, open_memory, require_model
from pipeline.memory.retrieve.bm25 import Hits
from pipeline.memory.retrieve.documents import load_documents
from pipeline.memory.retrieve.indexes import ArrayIndex, LanceIndex, check_indexes, uses_arrays
from pipeline.memory.retrieve.retrievers import Index, RetrieveConfig
from pipeline.memory.search_page import picture_grid, picture_page
from pipeline.memory.store import clip_configs
from pipeline.memory.vectors import document_vector

if TYPE_CHECKING:
    from infra.clip import Clip

SHOWN = ("text", "image", "source_name", "licence", "split", "source_uri", "start_s")


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
    clip: str | None = None
    """Name or hash of one of the memory's CLIPs (`build-index --add-clip`); None = the first."""
    filters: Filters = Filters()
    """Which documents may be found."""
    version: str | None = None
    """Tag of an older version of the memory; None = the newest."""
    out: str | None = None
    """Folder for `search.html` and `search.png`; None = no pictures."""


@dataclass(frozen=True)
class Query:
    """A question: words, a picture, or both."""

    text: str | None = None
    image: bytes | None = None
    """Encoded picture (JPEG, PNG, ...)."""


@dataclass(frozen=True)
class Hit:
    """One answer."""

    doc_id: str
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
        if config.method.needs_vectors:
            if clip is None:
                raise ConfigError(f"retriever {config.retriever} needs a CLIP", cure="use bm25, or load one")
            if clip.model_hash not in memory.certificate.facts.get("clips", {}):
                require_model(memory, clip.model_hash, name=clip.name)
        self.memory, self.config, self.clip = memory, config, clip
        self.added = None if clip is None or clip.model_hash == memory.model_hash else clip.model_hash
        self.uses_arrays = self.added is None and uses_arrays(config, memory.num_documents)
        if not self.uses_arrays:
            check_indexes(memory, config)

    def __call__(self, queries: Sequence[Query], filters: Filters | None = None) -> list[list[Hit]]:
        """The `config.k` best documents of each query, best first."""
        method, k = self.config.method, self.config.k
        index = self._index(filters.where() if filters else None)
        texts = [query.text or "" for query in queries]
        depth = max(k, self.config.depth) if method.needs_words and method.needs_vectors else k
        found = method.search(index, texts, self._vectors(queries), depth)
        return [self._named(Hits(hits.docs[:k], hits.scores[:k])) for hits in found]

    def _index(self, where: str | None) -> Index:
        if not self.uses_arrays:
            column = model_column(f"{self.config.against}_embedding", self.added)
            return LanceIndex(self.memory, column, where)
        return self._arrays if where is None else Filtered(self._arrays, self._allowed(where))

    @cached_property
    def _arrays(self) -> ArrayIndex:
        return ArrayIndex(load_documents(self.memory, self.config.analysis), self.config.against)

    def _allowed(self, where: str) -> np.ndarray:
        found = self.memory.table.search().where(where).select(["doc_id"]).to_arrow()["doc_id"]
        mask = np.zeros(len(self._arrays.documents), bool)
        mask[self._arrays.documents.find(found.to_pylist())] = len(found) > 0
        return mask

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

    def _named(self, hits: Hits) -> list[Hit]:
        ids = self._arrays.documents.ids[hits.docs] if self.uses_arrays else hits.docs
        found = zip(ids.tolist(), hits.scores.tolist(), strict=True)
        return [Hit(doc_id.decode(), rank, score) for rank, (doc_id, score) in enumerate(found, start=1)]


@dataclass(frozen=True)
class Filtered:
    """An index of which only some documents may be found; it looks deeper until there are enough of them."""

    index: ArrayIndex
    allowed: np.ndarray
    """bool `n`."""

    def by_words(self, texts: Sequence[str], depth: int) -> list[Hits]:
        return self._passing(lambda reach: self.index.by_words(texts, reach), depth)

    def by_vectors(self, vectors: np.ndarray, depth: int) -> list[Hits]:
        return self._passing(lambda reach: self.index.by_vectors(vectors, reach), depth)

    def _passing(self, search: Callable[[int], list[Hits]], depth: int) -> list[Hits]:
        wanted, reach, total = min(depth, int(self.allowed.sum())), depth, len(self.allowed)
        while True:
            every = search(reach)
            masks = [self.allowed[hits.docs] for hits in every]
            found = [
                Hits(h.docs[mask][:depth], h.scores[mask][:depth]) for h, mask in zip(every, masks, strict=True)
            ]
            is_enough = [len(f) >= wanted or len(e) < reach for f, e in zip(found, every, strict=True)]
            if reach >= total or all(is_enough):
                return found
            reach = min(4 * reach, total)


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
    clip = load_memory_clip(memory, config.clip) if config.retrieve.method.needs_vectors else None
    query = Query(config.text, read_bytes(absolute(config.image)) if config.image else None)
    hits = Searcher(memory, config.retrieve, clip)([query], config.filters)[0]
    rows = _rows(memory, hits)
    _print(rows, config, memory)
    if config.out:
        out, title = absolute(config.out), config.text or config.image or ""
        write_bytes(join(out, "search.html"), picture_page(title, rows, query.image))
        write_bytes(join(out, "search.png"), picture_grid(rows))
        print(f"  pictures: {join(out, 'search.html')}")
    return rows


def load_memory_clip(memory: Memory, name: str | None) -> "Clip":
    """A CLIP that embedded the memory, as its own config names it.

    Args:
        memory: an open memory.
        name: name or hash of one of them; None = the one that it was built with.

    Raises:
        ConfigError: the memory doesn't say, or that model can't be loaded.
    """
    from infra.clip import load_clip

    configs = clip_configs(memory)
    found = [clip for key, clip in configs.items() if name is None or clip.name == name or key.startswith(name)]
    if not found:
        raise ConfigError(
            f"no CLIP {name!r} in {memory.uri}", legal=", ".join(c.name for c in configs.values())
        )
    return load_clip(found[0], "cpu")


def _rows(memory: Memory, hits: list[Hit]) -> list[dict[str, Any]]:
    found = memory.rows([hit.doc_id for hit in hits], SHOWN).to_pylist()
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
