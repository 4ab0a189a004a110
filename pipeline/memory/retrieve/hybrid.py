"""Hybrid: BM25 and CLIP, merged by reciprocal rank fusion."""

from collections.abc import Sequence

import numpy as np

from pipeline.memory.retrieve.hits import Hits
from pipeline.memory.retrieve.retriever import Retriever, Searched

RRF_K = 60
"""Constant of reciprocal rank fusion: Cormack, Clarke & Buettcher (2009); LanceDB's default as well."""


class Hybrid(Retriever):
    """score(d) = sum over both lists of 1 / (`RRF_K` + rank of d), over the first `depth` of each: a document
    that neither list holds has no score.
    """

    needs_words = needs_vectors = True

    def search(self, tile: Searched, texts: Sequence[str], vectors: np.ndarray, depth: int) -> list[list[Hits]]:
        return [tile.by_words(texts, depth), tile.by_vectors(vectors, depth)]

    def fuse(self, rows: np.ndarray, depth: int) -> np.ndarray:
        rank = np.arange(len(rows)) - np.searchsorted(rows["kind"], rows["kind"])
        _, first, inverse = np.unique(rows["doc"], return_index=True, return_inverse=True)
        fused = rows[first]
        fused["score"] = np.bincount(inverse, 1 / (RRF_K + 1 + rank), minlength=len(first))
        return fused[np.lexsort((fused["doc"], fused["key"], -fused["score"]))][:depth]
