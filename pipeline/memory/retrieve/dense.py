"""Exact nearest documents by inner product, for whole batches of queries, on CPUs.

    first pass    all products in bfloat16 where the CPU multiplies it natively (else float32)
    short list    every document whose rounded product could still belong to the first `depth`;
                  |rounded - true| is bounded by the roundings that did happen (Cauchy-Schwarz)
    second pass   the short list's products in float64, one row at a time

The answer is that of an exhaustive float32 search, ties by document number, and doesn't depend on how
queries were batched: what byte-identical shards need.
"""

import itertools

import numpy as np

from pipeline.memory.retrieve.bm25 import Hits
from pipeline.memory.vectors import cosines

BLOCK = 64
"""Documents whose largest product stands for them when the short list is looked for."""
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float32": 2.0**-16}
"""Relative error of a rounded product; float32's own 2^-24 is widened for the sum of `d` terms."""
SCORES_BYTES = 128 << 20
"""Memory for one block of products."""
PAIRS = 4096
"""Candidates whose exact products are taken at once."""


class Dense:
    """Unit vectors of the documents, searched exhaustively.

    Args:
        vectors: float16 or float32 `n d`, unit norm; may be memory-mapped.
    """

    def __init__(self, vectors: np.ndarray) -> None:
        import torch

        self.vectors = vectors
        self.dtype = torch.bfloat16 if _multiplies_bfloat16() else torch.float32
        padded = -(-len(vectors) // BLOCK) * BLOCK
        self.coarse = torch.zeros(padded, vectors.shape[1], dtype=self.dtype)
        self.residual = 0.0  # longest part of a document that rounding cut off
        for start in range(0, len(vectors), 1 << 16):
            piece = torch.from_numpy(np.array(vectors[start : start + (1 << 16)])).float()
            self.coarse[start : start + len(piece)] = piece
            lost = piece - self.coarse[start : start + len(piece)]
            self.residual = max(self.residual, float(lost.norm(dim=1).max()))

    def search(self, queries: np.ndarray, depth: int) -> list[Hits]:
        """The `depth` best documents of each query.

        Args:
            queries: float32 `q d`, unit norm.
            depth: documents wanted of each.
        """
        depth = min(depth, len(self.vectors))
        if depth == 0:
            return [Hits(np.zeros(0, np.int32), np.zeros(0)) for _ in queries]
        step = max(1, min(256, SCORES_BYTES // max(1, self.coarse.shape[0] * 4)))
        pieces = (queries[start : start + step] for start in range(0, len(queries), step))
        return [hits for piece in pieces for hits in self._search(piece, depth)]

    def _search(self, queries: np.ndarray, depth: int) -> list[Hits]:
        import torch

        exact = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
        rounded = exact.to(self.dtype)
        products = rounded @ self.coarse.T
        products[:, len(self.vectors) :] = -4.0  # padding, below every product of unit vectors
        blocks = products.view(len(queries), -1, BLOCK)
        largest = blocks.amax(-1)
        # The k-th largest block maximum is a floor for the k-th largest product.
        deep_enough = largest if largest.shape[1] >= depth else products
        floors = deep_enough.topk(depth, dim=1).values[:, -1].float()
        roundoff = UNIT_ROUNDOFF[str(self.dtype).removeprefix("torch.")]
        slacks = (exact - rounded).norm(dim=1) + self.residual * 1.01
        slacks = 2 * (slacks + roundoff * (largest.amax(1).float().abs() + 2.0**-6))
        largest, floors, slacks = (x.float().numpy() for x in (largest, floors, slacks))
        # Numpy from here on, all queries at once: small steps for each would cost more than the products.
        bars = floors - slacks
        row, block = np.nonzero(largest >= bars[:, None])
        values = blocks[torch.from_numpy(row), torch.from_numpy(block)].float().numpy()
        near, column = np.nonzero(values >= bars[row][:, None])
        values, docs, row = values[near, column], block[near] * BLOCK + column, row[near]
        # Now that the products are there, the k-th largest itself is the floor.
        order = np.lexsort((-values, row))
        kth = values[order][np.searchsorted(row[order], np.arange(len(queries))) + depth - 1]
        near = np.flatnonzero((values >= (kth - slacks)[row]) & (docs < len(self.vectors)))
        return rank(self.vectors, np.asarray(queries, np.float32), row[near], docs[near], depth)


def rank(vectors: np.ndarray, queries: np.ndarray, row: np.ndarray, docs: np.ndarray, depth: int) -> list[Hits]:
    """The `depth` best candidates of each query by their exact products, ties by document number.

    Args:
        vectors: `n d`, the documents.
        queries: float32 `q d`.
        row: `m`, the query of each candidate, ascending.
        docs: `m`, its document; a query's candidates are all different.
        depth: documents wanted of each.
    """
    scores = np.empty(len(docs))
    for start in range(0, len(docs), PAIRS):
        part = slice(start, start + PAIRS)
        scores[part] = dots(vectors[docs[part]], queries[row[part]])
    order = np.lexsort((docs, -scores, row))
    docs, scores = docs[order].astype(np.int32), scores[order]
    ends = np.searchsorted(row, np.arange(len(queries) + 1))
    spans = [slice(a, min(b, a + depth)) for a, b in itertools.pairwise(ends.tolist())]
    return [Hits(docs[span], scores[span]) for span in spans]


def dots(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Inner products of `rows` (`m d`) with `query` (`d`, or `m d`), float64, then rounded to float32."""
    import torch

    wide = torch.from_numpy(np.ascontiguousarray(rows)).double().numpy()  # numpy is slow on float16
    return cosines(wide, query).astype(np.float32).astype(np.float64)


def _multiplies_bfloat16() -> bool:
    import torch

    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(probe is not None and probe())
