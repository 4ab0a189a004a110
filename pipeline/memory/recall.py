"""Recall@k of a vector search against the exact answer, with a lower bound that can be trusted."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from infra.config import Config, Incidental
from pipeline.memory.retrieve.analysis import Analysis
from pipeline.memory.store import EMBEDDINGS, id_filter, vectors_numpy
from pipeline.memory.vectors import unit

K = 10
"""Neighbours that the declared recall is about."""
Z_95 = 2.128045234184983
"""One-sided quantile of the normal distribution at 1 - 0.05 / 3: a build may put up to three settings to
the test, and all three bounds hold together in 95 of 100 builds (Bonferroni)."""
TIE = 1e-4
"""Cosines closer than this are equal: float16 vectors don't resolve more."""


class IndexConfig(Config):
    """What the vector indexes must reach, and what they may cost."""

    kind: Literal["auto", "flat", "rq", "hnsw", "pq"] = "auto"
    """flat = exact; rq = IVF_RQ (RaBitQ); hnsw = IVF_HNSW_SQ; pq = IVF_PQ, each but flat followed by
    refinement on the stored vectors. auto = flat up to `EXACT_ROWS` documents, then rq (its build took 1/130 of
    IVF_PQ's time on 100,000 vectors)."""
    columns: tuple[str, ...] = EMBEDDINGS
    """Embedding columns that get an index; searching another one scans it exactly."""
    recall: float = Field(default=0.98, gt=0, lt=1)
    """Declared recall@10: the least that the 95 % lower bound may be. Ours."""
    analysis: Analysis = "english"
    """Of the full-text index, for memories that are searched through it: see `retrieve.analysis`."""
    max_index_bytes: Incidental[int] = Field(default=8_000_000_000, ge=1)
    """Memory that the vector indexes may take together, bytes. A build that it refused goes on with
    a larger one: nothing is embedded again. Ours."""


@dataclass(frozen=True)
class Exact:
    """The true neighbours of a sample of queries."""

    queries: np.ndarray
    """float32 `q d`, unit rows."""
    own_ids: list[str]
    """The document that each query was taken from; it doesn't count as its own neighbour."""
    ids: np.ndarray
    """object `q m`: the nearest documents of each query, k and then some, in no order; None = no more."""
    scores: np.ndarray
    """float32 `q m`: their cosines; -inf where there is none."""
    answers: "Exact | None" = None
    """What the index answered to the same queries: its k + 1 nearest, in the same form; None = not asked."""

    def __len__(self) -> int:
        return len(self.own_ids)

    def take(self, some: np.ndarray | slice) -> "Exact":
        own = np.asarray(self.own_ids, object)[some].tolist()
        answers = None if self.answers is None else self.answers.take(some)
        return Exact(self.queries[some], own, self.ids[some], self.scores[some], answers)

    def lists(self) -> list[list[tuple[str, float]]]:
        """(document, cosine) of each query, best first, equal cosines in order of id."""
        found = []
        for ids, scores in zip(self.ids, self.scores, strict=True):
            pairs = [(-float(s), n) for n, s in zip(ids, scores, strict=True) if n is not None]
            found.append([(doc_id, -score) for score, doc_id in sorted(pairs)])
        return found

    def forget(self, removed: frozenset[str]) -> "Exact":
        """Without these documents in the lists; the queries all stay."""
        if not removed:
            return self
        gone = np.isin(self.ids.astype(str), sorted(removed))
        ids, scores = self.ids.copy(), self.scores.copy()
        ids[gone], scores[gone] = None, -np.inf
        return replace(self, ids=ids, scores=scores)

    def truth(self, row: int, k: int) -> tuple[dict[str, float], float]:
        """(cosines of a query's nearest documents but its own, the k-th best of them)."""
        both = zip(self.ids[row], self.scores[row], strict=True)
        others = {n: float(s) for n, s in both if n is not None and n != self.own_ids[row]}
        ranked = sorted(others.values(), reverse=True)
        return others, ranked[min(k, len(ranked)) - 1] if ranked else -math.inf


def width(k: int) -> int:
    """Documents that are kept of each query: room for its own, for ties, and for some that are dropped."""
    return 2 * k + 8


def exact_neighbours(
    blocks: Iterable[tuple[pa.Array, np.ndarray]], queries: np.ndarray, own_ids: Sequence[str], *, k: int
) -> Exact:
    """Brute force over streamed blocks of (doc_id, float16 `n d`); memory is bounded by one block."""
    keep = width(k)
    empty = np.full((len(queries), keep), None, object), np.full((len(queries), keep), -np.inf, np.float32)
    return merge(Exact(queries, list(own_ids), *empty), blocks, all_new=True)


def merge(exact: Exact, blocks: Iterable[tuple[pa.Array, np.ndarray]], *, all_new: bool = False) -> Exact:
    """The true neighbours once these documents are there too; `all_new` = none of them stands in the lists."""
    ids, scores = exact.ids, exact.scores
    keep = ids.shape[1]
    for block_ids, block in blocks:
        names = np.asarray(block_ids.to_numpy(zero_copy_only=False), object)
        for start in range(0, len(exact.queries), 512):  # bounds the products: 512 queries at once
            part = slice(start, start + 512)
            found = exact.queries[part] @ unit(block).T
            rows, columns = _better(found, scores[part].min(axis=1), keep)
            if not len(rows):
                continue
            order = np.arange(len(rows)) - np.searchsorted(rows, rows)
            more_scores = np.full((len(found), int(order.max()) + 1), -np.inf, np.float32)
            more_ids = np.full(more_scores.shape, None, object)
            more_scores[rows, order], more_ids[rows, order] = found[rows, columns], names[columns]
            if not all_new:
                _forget_known(ids[part], more_ids, more_scores)
            all_scores = np.concatenate([scores[part], more_scores], axis=1)
            best = _top(all_scores, keep)
            ids, scores = _writable(ids, exact.ids), _writable(scores, exact.scores)
            scores[part] = np.take_along_axis(all_scores, best, 1)
            ids[part] = np.take_along_axis(np.concatenate([ids[part], more_ids], axis=1), best, 1)
    return replace(exact, ids=ids, scores=scores)


def without(exact: Exact, removed: frozenset[str], *, k: int) -> Exact:
    """The sample once these documents are gone; queries that know too few of the rest are left out."""
    if not removed:
        return exact
    before = (exact.scores > -np.inf).sum(axis=1)
    rest = exact.forget(removed)
    left = (rest.scores > -np.inf).sum(axis=1)
    sure = (left == before) | (left > k)  # more than k of the true list are left: the k best are known
    return rest.take(np.flatnonzero(sure))


def _better(found: np.ndarray, bars: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of what may belong to the best: after a few blocks hardly any score does."""
    mask = found > bars[:, None]
    if mask.sum() <= 2 * keep * len(found):
        rows, columns = np.nonzero(mask)
        return rows, columns
    best = _top(found, keep)
    return np.repeat(np.arange(len(found)), best.shape[1]), best.reshape(-1)


def _forget_known(ids: np.ndarray, more_ids: np.ndarray, more_scores: np.ndarray) -> None:
    """Documents that stand in the lists already don't come in twice."""
    for row in np.flatnonzero([name is not None for name in more_ids[:, 0]]):
        known = set(ids[row])
        for column, name in enumerate(more_ids[row]):
            if name is not None and name in known:
                more_scores[row, column] = -np.inf
                more_ids[row, column] = None


def _writable(array: np.ndarray, original: np.ndarray) -> np.ndarray:
    return array.copy() if array is original else array


def hits(exact: Exact, answers: Sequence[Sequence[str | tuple[str, float]]], *, k: int) -> np.ndarray:
    """Recall of each query: the share of its k true neighbours (or equals of the k-th) among the answers.

    Args:
        exact: the true neighbours.
        answers: documents found, best first; with their exact cosines if they are known. Those count where
            more documents are equal than `exact` keeps (one picture with a hundred captions).
        k: neighbours that the recall is about.
    """
    found = np.zeros(len(answers))
    for i, answer in enumerate(answers):
        truth, bar = exact.truth(i, k)
        wanted = min(k, len(truth))
        is_cut = min(truth.values(), default=-math.inf) >= bar - TIE  # equals beyond the list are unknown
        pairs = [(a, -math.inf) if isinstance(a, str) else a for a in answer]
        others = [(doc_id, score) for doc_id, score in pairs if doc_id != exact.own_ids[i]][:k]
        good = sum(truth.get(doc_id, score if is_cut else -math.inf) >= bar - TIE for doc_id, score in others)
        found[i] = min(good, wanted) / wanted if wanted else 1.0
    return found


def lower_bound(recalls: np.ndarray) -> float:
    """One-sided 95 % lower bound of the mean recall.

    Wilson's bound with as many trials as the queries are worth: a mean of values in [0, 1] varies at
    most like a coin of the same mean (Bhatia and Davis 2000), and by less where queries miss one of k
    documents rather than all. How much less is measured (the design effect of survey statistics, Kish
    1965), with one query that found nothing added, so that a run of luck can't promise too much: where
    all found everything, a query counts as one trial. (Counting each of the k hits as one would promise
    too much: the hits of a query hang together.)
    """
    z = Z_95
    n, p = len(recalls), float(np.mean(recalls)) if len(recalls) else 0.0
    if not n:
        return 0.0
    with_failure = np.append(recalls, 0.0)
    mean = float(np.mean(with_failure))
    trials = n * max(mean * (1 - mean) / max(float(np.var(with_failure)), 1e-12), 1.0)
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, (centre - spread) / (1 + z * z / trials))


def queries_for(bound: float) -> int:
    """How many queries with full recall are needed before `lower_bound` can reach `bound`."""
    return math.ceil(Z_95 * Z_95 * bound / max(1 - bound, 1e-9))


def sample_queries(table: Any, column: str, doc_ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The vectors of these documents, float32 `q d` of unit norm, and their ids (those that have one)."""
    vectors, ids = [], []
    for start in range(0, len(doc_ids), 512):
        chunk = doc_ids[start : start + 512]
        rows = table.search().where(id_filter(chunk)).select(["doc_id", column]).limit(len(chunk))
        rows = rows.to_arrow().sort_by("doc_id").combine_chunks()
        rows = rows.filter(rows[column].is_valid())
        for part in rows.to_batches():
            vectors.append(unit(vectors_numpy(part[column])))
            ids += part["doc_id"].to_pylist()
    dim = table.schema.field(column).type.list_size
    return np.concatenate(vectors) if vectors else np.empty((0, dim), np.float32), ids


def _top(scores: np.ndarray, keep: int) -> np.ndarray:
    """Column numbers of the `keep` best of each row, in no order."""
    if scores.shape[1] <= keep:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.argpartition(scores, scores.shape[1] - keep, axis=1)[:, -keep:]
