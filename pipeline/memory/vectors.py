"""Unit vectors: cosines, means, and LanceDB's nearest ones for a batch of queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

Kind = Literal["flat", "rq", "hnsw", "pq"]
QUERIES_PER_CALL = 256  # LanceDB shares one scan among them; more costs memory and gains nothing


@dataclass(frozen=True)
class Setting:
    """How to search one column: the index and its dials."""

    kind: Kind
    num_bits: int = 0
    """Bits a dimension (rq, pq)."""
    nprobes: int = 0
    """Partitions read; 0 = all."""
    refine: int = 0
    """The first `refine * k` candidates are scored again on the stored vectors; 0 = not."""
    ef: int = 0
    """Candidates kept while walking the graph (hnsw)."""

    def bytes_of(self, rows: int, dim: int) -> int:
        """Size of the index in memory, about (checked against LanceDB's own figures)."""
        each = {
            "flat": 2 * dim,
            "rq": dim * max(self.num_bits, 1) / 8 + 20,
            "pq": dim / 8 + 8,
            "hnsw": dim + 4 * 2 * 20 + 16,
        }[self.kind]
        return int(rows * each)


def vector_search(
    table: Any,
    column: str,
    queries: np.ndarray,
    setting: Setting | None,
    *,
    k: int,
    where: str | None = None,
) -> list[list[tuple[str, float]]]:
    """The k nearest documents of each query, best first, as (doc_id, cosine); QUERIES_PER_CALL at once.

    Args:
        table: LanceDB table.
        column: embedding column.
        queries: float32 `q d`.
        setting: how to search; None = exact, without an index.
        k: answers a query.
        where: SQL filter, applied before the search.
    """
    answers: list[list[tuple[str, float]]] = []
    for start in range(0, len(queries), QUERIES_PER_CALL):
        chunk = list(queries[start : start + QUERIES_PER_CALL])
        single = len(chunk) == 1  # LanceDB numbers the answers of two queries and more
        query = table.search(chunk * 2 if single else chunk, vector_column_name=column)
        query = _dial(query.distance_type("cosine"), setting)
        query = query.where(where, prefilter=True) if where else query
        found = query.limit(k).select(["doc_id", "_distance"]).to_arrow()
        answers += _grouped(found, len(chunk))
    return answers


def _dial(query: Any, setting: Setting | None) -> Any:
    if setting is None or setting.kind == "flat":
        return query.bypass_vector_index()
    query = query.nprobes(setting.nprobes)
    query = query.refine_factor(setting.refine) if setting.refine else query
    return query.ef(setting.ef) if setting.ef else query


def _grouped(found: Any, count: int) -> list[list[tuple[str, float]]]:
    answers: list[list[tuple[str, float]]] = [[] for _ in range(count)]
    columns = (found[name].to_pylist() for name in ("query_index", "doc_id", "_distance"))
    for number, doc_id, distance in zip(*columns, strict=True):
        if number < count:
            answers[number].append((doc_id, 1.0 - distance))
    # Equal cosines in order of id, so that the answer doesn't hang on where a row lies.
    return [sorted(answer, key=lambda hit: (-hit[1], hit[0])) for answer in answers]


def setting_of(facts: dict[str, Any], column: str) -> Setting | None:
    """The verified setting of a column from a certificate's facts; None when it has no index."""
    found = facts.get("indexes", {}).get(column)
    return Setting(**found["setting"]) if found else None


def unit(vectors: np.ndarray) -> np.ndarray:
    """Float32 rows of length 1; a zero row stays zero."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def rows_or_zeros(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors as float32 `n d`; a missing one is a row of zeros."""
    dim = column.type.list_size
    rows = [np.zeros(dim) if row is None else row for row in column.to_pylist()]
    return np.asarray(rows, np.float32).reshape(len(rows), dim)


def cosines(vectors: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products of the rows of `vectors` (`m d`, unit) with `other` (`d` or `m d`, unit), float64.

    Each row by itself: a matrix product's last bits depend on how many rows there are, these don't.
    """
    wide = vectors if vectors.dtype == np.float64 else np.asarray(vectors, np.float32).astype(np.float64)
    return (wide * np.asarray(other, np.float32)).sum(axis=-1)


def spread(vectors: np.ndarray, k: int, *, max_similarity: float) -> tuple[list[int], int]:
    """Choose the first `k` candidates of which none is too similar to one chosen before.

    Args:
        vectors: unit picture embeddings of the candidates, best first, `m d`; zero rows are similar to nothing.
        k: how many to choose.
        max_similarity: a candidate above this cosine with a chosen one is skipped.

    Returns:
        Places of the chosen; how many before the last of them were skipped.
    """
    chosen: list[int] = []
    for place in range(len(vectors)):
        if len(chosen) == k:
            return chosen, place - k
        if not chosen or cosines(vectors[chosen], vectors[place]).max() <= max_similarity:
            chosen.append(place)
    return chosen, len(vectors) - len(chosen)


def frame_mean(frames: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Normalise, mean, normalise over each run of `counts` rows (RAGME): `sum(counts) d` -> `n d`."""
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(unit(frames), starts, axis=0)
    return unit(sums / np.asarray(counts, np.float32)[:, None])


def document_vector(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """RA-CM3 (arXiv 2211.12561): the normalised mean of the two unit vectors."""
    return unit((image + text) / 2)
