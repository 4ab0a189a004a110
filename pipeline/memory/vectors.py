"""One way to ask LanceDB for the nearest vectors: a batch of queries, an index with its dials, a filter."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

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
