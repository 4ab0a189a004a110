"""CLIP: captions' vectors against the documents' (RA-CM3), exhaustive and exact, on a GPU if there is one.

    first pass    all products of a block of documents, in the shortest float that the processor multiplies
    short list    every document whose rounded product could still belong to the first `depth`;
                  |rounded - true| is bounded by the roundings that did happen (Cauchy-Schwarz)
    second pass   the short list's products in float64, one row at a time

The answer is that of an exhaustive search by exact products, rounded to float32, and doesn't depend on how
queries and documents were batched: what byte-identical shards need.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from infra.cluster import may_use_gpu
from pipeline.memory.retrieve.hits import NOTHING, Hits, ranked
from pipeline.memory.retrieve.retriever import Retriever, Searched
from pipeline.memory.vectors import cosines

UNIT_ROUNDOFF = {"float16": 2.0**-9, "bfloat16": 2.0**-8, "float32": 2.0**-16}
"""Relative error of a rounded product; float32's own 2^-24 is widened for the sum of `d` terms."""
QUERIES = 256
"""Queries that are multiplied with a block at once: 32 MB of products with `BLOCK_ROWS`."""
BLOCK_ROWS = 1 << 15
"""Documents of a block. Ours."""
PAIRS = 4096
"""Candidates whose exact products are taken at once."""


class Clip(Retriever):
    """The caption's CLIP vector against the documents' vectors."""

    needs_vectors = True

    def search(self, tile: Searched, texts: Sequence[str], vectors: np.ndarray, depth: int) -> list[list[Hits]]:
        return [tile.by_vectors(vectors, depth)]


@dataclass(frozen=True)
class Block:
    """Some documents' vectors, and what is multiplied in their place."""

    vectors: np.ndarray  # float16 [n d]
    coarse: Any  # torch [n d]
    lost: float
    """Longest part of a document that rounding cut off."""

    @classmethod
    def make(cls, vectors: np.ndarray) -> "Block":
        import torch

        device, dtype = arithmetic()
        exact = torch.from_numpy(np.array(vectors))  # a copy: what Arrow lends can't be written to
        coarse = exact.to(device=device, dtype=dtype)
        lost = 0.0 if dtype == exact.dtype else float((exact.float() - coarse.float()).norm(dim=1).max())
        return cls(vectors, coarse, lost)


def nearest(blocks: Iterable[Block], queries: np.ndarray, keys: np.ndarray, depth: int) -> list[Hits]:
    """The `depth` best documents of each query by inner product; a zero query finds nothing.

    Args:
        blocks: of all documents, in order; each is met once.
        queries: float32 `q d`, unit norm.
        keys: uint64 `n`, what orders equal scores.
        depth: documents wanted of each.
    """
    searches = [Running(queries[at : at + QUERIES], depth) for at in range(0, len(queries), QUERIES)]
    first = 0
    for block in blocks:
        for search in searches:
            search.meet(block, first)
        first += len(block.vectors)
    return [hits for search in searches for hits in search.finish(keys)]


class Running:
    """The best documents so far of a few queries."""

    def __init__(self, queries: np.ndarray, depth: int) -> None:
        import torch

        device, dtype = arithmetic()
        exact = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
        self.queries, self.depth, self.lost = exact.numpy(), depth, 0.0
        self.rounded = exact.to(device=device, dtype=dtype)
        self.cut = (exact - self.rounded.float().cpu()).norm(dim=1).to(device)
        self.best = torch.full((len(exact), depth), -4.0, device=device)  # below every product of unit vectors
        self.rows, self.docs, self.scores = [], [], []

    def meet(self, block: Block, first: int) -> None:
        import torch

        if not len(block.vectors):
            return
        self.lost = max(self.lost, block.lost)
        products = (self.rounded @ block.coarse.T).float()
        top = products.topk(min(self.depth, products.shape[1]), dim=1).values
        self.best = torch.cat([self.best, top], dim=1).topk(self.depth, dim=1).values
        roundoff = UNIT_ROUNDOFF[str(block.coarse.dtype).removeprefix("torch.")]
        error = self.cut + 1.01 * self.lost + roundoff * (self.best[:, 0].abs() + 2.0**-6)
        bars = self.best[:, -1] - 2 * error
        rows, columns = (x.cpu().numpy() for x in torch.nonzero(products >= bars[:, None], as_tuple=True))
        for at in range(0, len(rows), PAIRS):
            part = slice(at, at + PAIRS)
            self.scores.append(dots(block.vectors[columns[part]], self.queries[rows[part]]))
        self.rows.append(rows)
        self.docs.append(columns + first)

    def finish(self, keys: np.ndarray) -> list[Hits]:
        if not self.rows:
            return [NOTHING] * len(self.queries)
        rows, docs, scores = map(np.concatenate, (self.rows, self.docs, self.scores or [np.zeros(0)]))
        order = np.argsort(rows, kind="stable")
        ends = np.searchsorted(rows[order], np.arange(len(self.queries) + 1))
        parts = [order[start:end] for start, end in itertools.pairwise(ends)]
        found = [ranked(docs[part], scores[part], keys, self.depth) for part in parts]
        return [hits if query.any() else NOTHING for hits, query in zip(found, self.queries, strict=True)]


def dots(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Inner products of `rows` (`m d`) with `query` (`d`, or `m d`), float64, then rounded to float32."""
    import torch

    wide = torch.from_numpy(np.ascontiguousarray(rows)).double().numpy()  # numpy is slow on float16
    return cosines(wide, query).astype(np.float32).astype(np.float64)


def arithmetic() -> tuple[Any, Any]:
    """(device, float type) of the first pass."""
    import torch

    if torch.cuda.is_available() and may_use_gpu():
        return torch.device("cuda"), torch.float16
    return torch.device("cpu"), torch.bfloat16 if _multiplies_bfloat16() else torch.float32


@cache
def _multiplies_bfloat16() -> bool:
    import torch

    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return probe is not None and bool(probe())
