"""One call, a batch of queries: BM25, CLIP or both, over the documents that a filter lets through.

    bm25                      words against the documents' words
    clip, against=image       text -> image, or image -> image
    clip, against=text        text -> text
    clip, against=document    RA-CM3's vector: the unit mean of picture and text
    hybrid                    both lists merged by reciprocal rank fusion, with weights

Small and middling memories are answered exactly from arrays (pipeline/memory/retrieve); those beyond
`max_exact_documents` by LanceDB's indexes with the settings whose recall the certificate proves. A filter
comes first in both: ranks are ranks among the documents that pass.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.config import Config
from infra.errors import ConfigError
from pipeline.memory import Memory, model_column, require_model
from pipeline.memory.embed import document_vector
from pipeline.memory.retrieve.bm25 import Hits, ranked
from pipeline.memory.retrieve.config import RetrieveConfig
from pipeline.memory.retrieve.dense import Dense
from pipeline.memory.retrieve.documents import Documents, load_documents
from pipeline.memory.retrieve.fuse import reciprocal_rank
from pipeline.memory.retrieve.join import uses_arrays
from pipeline.memory.vectors import setting_of, vector_search

if TYPE_CHECKING:
    from infra.clip import Clip

_NO_PICTURE, _PICTURES = "these bytes are no picture", "JPEG, PNG, WebP, ..."
FTS_THREADS = 4  # LanceDB answers one full-text query at a time; more threads gain nothing (measured)


class Filters(Config):
    """Which documents may be found; empty = all."""

    sources: tuple[str, ...] = ()
    """Names of corpora (`source_name`)."""
    licences: tuple[str, ...] = ()
    """Licences; a document without one is found only without this filter."""
    splits: tuple[str, ...] = ()
    """train, val, test."""
    min_width_px: int = 0
    """Least width of the document's picture or clip."""
    min_height_px: int = 0
    """Least height."""

    def where(self) -> str | None:
        """As a SQL condition."""
        named = {"source_name": self.sources, "licence": self.licences, "split": self.splits}
        parts = [f"{column} IN ({', '.join(map(_quoted, names))})" for column, names in named.items() if names]
        sizes = {"width_px": self.min_width_px, "height_px": self.min_height_px}
        parts += [f"{column} >= {least}" for column, least in sizes.items() if least]
        return " AND ".join(parts) or None


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
    """bm25: BM25; clip: cosine; hybrid: sum of weight / (rrf_k + rank)."""


class Searcher:
    """A memory, ready for batches of queries.

    Args:
        memory: from `open_memory`.
        config: retriever, what is compared, weights.
        clip: the memory's own CLIP; needed by clip and hybrid.

    Raises:
        ConfigError: a CLIP is missing or is not the memory's.
    """

    def __init__(self, memory: Memory, config: RetrieveConfig, clip: "Clip | None" = None) -> None:
        if config.retriever != "bm25":
            if clip is None:
                raise ConfigError(f"retriever {config.retriever} needs a CLIP", cure="use bm25, or load one")
            if clip.model_hash not in memory.certificate.facts.get("clips", {}):
                require_model(memory, clip.model_hash, name=clip.name)
        self.memory, self.config, self.clip = memory, config, clip
        self.is_first = clip is None or clip.model_hash == memory.model_hash
        self.uses_arrays = self.is_first and uses_arrays(config, memory.num_documents)

    def __call__(self, queries: Sequence[Query], filters: Filters | None = None) -> list[list[Hit]]:
        """The `config.k` best documents of each query, best first."""
        where = filters.where() if filters else None
        ask = self._ask_arrays if self.uses_arrays else self._ask_lance
        return ask(queries, self._vectors(queries), where)

    def _vectors(self, queries: Sequence[Query]) -> np.ndarray | None:
        """The queries' unit vectors, float32 `q d`; a zero row for one that has nothing to embed."""
        if self.clip is None or self.config.retriever == "bm25":
            return None
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

    def _ask_arrays(
        self, queries: Sequence[Query], vectors: np.ndarray | None, where: str | None
    ) -> list[list[Hit]]:
        allowed = self._allowed(where)
        lists: list[list[Hits]] = []
        if self.config.retriever != "clip":
            texts = [query.text or "" for query in queries]
            lists.append(
                _passing(lambda depth: self._documents.bm25.search(texts, depth), allowed, self._depth)
            )
        if vectors is not None:
            found = _passing(lambda depth: self._dense.search(vectors, depth), allowed, self._depth)
            lists.append([h if v.any() else _none() for h, v in zip(found, vectors, strict=True)])
        ids = self._ids
        return [
            [Hit(ids[doc], rank, float(score)) for rank, (doc, score) in enumerate(_pairs(hits), start=1)]
            for hits in (self._fuse(parts) for parts in zip(*lists, strict=True))
        ]

    def _ask_lance(
        self, queries: Sequence[Query], vectors: np.ndarray | None, where: str | None
    ) -> list[list[Hit]]:
        lists: list[list[list[tuple[str, float]]]] = []
        if self.config.retriever != "clip":
            with ThreadPoolExecutor(FTS_THREADS) as pool:
                texts = [query.text or "" for query in queries]
                lists.append(list(pool.map(lambda text: self._full_text(text, where), texts)))
        if vectors is not None:
            added = None if self.is_first or self.clip is None else self.clip.model_hash
            column = model_column(f"{self.config.against}_embedding", added)
            setting = setting_of(self.memory.certificate.facts, column)
            answers = vector_search(self.memory.table, column, vectors, setting, k=self._depth, where=where)
            lists.append([a if v.any() else [] for a, v in zip(answers, vectors, strict=True)])
        # Numbered in order of id, as in the arrays: equal scores then don't hang on the batch.
        ids = sorted({doc_id for answers in lists for answer in answers for doc_id, _ in answer})
        names = {doc_id: number for number, doc_id in enumerate(ids)}
        return [
            [Hit(ids[doc], rank, float(score)) for rank, (doc, score) in enumerate(_pairs(hits), start=1)]
            for hits in (
                self._fuse([_numbered(answer, names) for answer in parts]) for parts in zip(*lists, strict=True)
            )
        ]

    def _full_text(self, text: str, where: str | None) -> list[tuple[str, float]]:
        from lancedb.query import MatchQuery

        if not text.strip():
            return []
        match: Any = MatchQuery  # words, never parsed as a query language
        query = self.memory.table.search(match(text, "text"), query_type="fts")
        query = query.where(where, prefilter=True) if where else query
        found = query.limit(self._depth).select(["doc_id", "_score"]).to_arrow()
        return list(zip(found["doc_id"].to_pylist(), found["_score"].to_pylist(), strict=True))

    def _fuse(self, parts: Sequence[Hits]) -> Hits:
        if len(parts) == 1:
            return Hits(parts[0].docs[: self.config.k], parts[0].scores[: self.config.k])
        weights = (self.config.bm25_weight, self.config.clip_weight)
        return reciprocal_rank(parts, self.config.k, weights=weights, k=self.config.rrf_k)

    @property
    def _depth(self) -> int:
        """How deep each list goes: hybrid looks beyond the first k before it merges."""
        return max(self.config.k, self.config.depth if self.config.retriever == "hybrid" else 0)

    @cached_property
    def _documents(self) -> Documents:
        return load_documents(self.memory, k1=self.config.k1, b=self.config.b)

    @cached_property
    def _dense(self) -> Dense:
        return Dense(getattr(self._documents, self.config.against))

    @cached_property
    def _ids(self) -> list[str]:
        return self._documents.table["doc_id"].to_pylist()

    def _allowed(self, where: str | None) -> np.ndarray | None:
        """Bool `n`: may this document be found? None = all."""
        if where is None:
            return None
        found = self.memory.table.search().where(where).select(["doc_id"]).to_arrow()["doc_id"]
        mask = np.zeros(len(self._documents), bool)
        mask[self._documents.find(found.to_pylist())] = len(found) > 0
        return mask


def _passing(search: Callable[[int], list[Hits]], allowed: np.ndarray | None, depth: int) -> list[Hits]:
    """The first `depth` hits that may be found; looks deeper until there are enough or no more."""
    if allowed is None:
        return search(depth)
    wanted, reach = min(depth, int(allowed.sum())), depth
    if not wanted:
        return [_none() for _ in search(1)]
    while True:
        every = search(reach)
        found = [Hits(h.docs[allowed[h.docs]], h.scores[allowed[h.docs]]) for h in every]
        if reach >= len(allowed) or all(
            len(f) >= wanted or len(e) < reach for f, e in zip(found, every, strict=True)
        ):
            return [Hits(h.docs[:depth], h.scores[:depth]) for h in found]
        reach = min(4 * reach, len(allowed))


def _numbered(answer: Sequence[tuple[str, float]], names: dict[str, int]) -> Hits:
    """Hits of an answer, best first, equal scores in order of id."""
    docs = np.array([names[doc_id] for doc_id, _ in answer], np.int32)
    scores = np.array([score for _, score in answer], np.float64)
    return ranked(docs, scores, len(docs))


def _pairs(hits: Hits) -> zip:
    return zip(hits.docs.tolist(), hits.scores.tolist(), strict=True)


def _none() -> Hits:
    return Hits(np.zeros(0, np.int32), np.zeros(0))


def _picture(data: bytes | None) -> Any:
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data or b"")).convert("RGB")
    except UnidentifiedImageError:  # its own words name an object in memory
        raise ConfigError(f"the query's picture can't be read: {_NO_PICTURE}", legal=_PICTURES) from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"the query's picture can't be read: {error}", legal=_PICTURES) from None


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
