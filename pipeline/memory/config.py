"""What the vector indexes of a memory must reach."""

from typing import Literal

from pydantic import Field

from infra.config import Config
from pipeline.memory.store import EMBEDDINGS


class IndexConfig(Config):
    """What the vector indexes must reach, and what they may cost."""

    kind: Literal["auto", "flat", "rq", "hnsw", "pq"] = "auto"
    """flat = exact; rq = IVF_RQ (RaBitQ); hnsw = IVF_HNSW_SQ; pq = IVF_PQ, each but flat followed by
    refinement on the stored vectors. auto = flat up to `exact_rows`, then rq (its build took 1/130 of
    IVF_PQ's time on 100,000 vectors)."""
    columns: tuple[str, ...] = EMBEDDINGS
    """Embedding columns that get an index; searching another one scans it exactly."""
    recall: float = Field(default=0.98, gt=0, lt=1)
    """Declared recall@k: the least that the 95 % lower bound may be. Ours."""
    k: int = Field(default=10, ge=1, le=1000)
    """Neighbours that the recall is about."""
    num_queries: int = Field(default=1000, ge=20)
    """Held-out queries of the verification, for each column and kind of query. Ours: the bound then
    lies within 0.003 of a recall of 1."""
    num_tuning_queries: int = Field(default=200, ge=10)
    """Queries, other ones, on which the search settings are tuned. Ours."""
    exact_rows: int = Field(default=20_000, ge=1)
    """Tables up to this size are searched exactly (auto). Ours: a scan then takes milliseconds."""
    retune_frac: float = Field(default=0.1, ge=0, le=1)
    """A memory that grew is compacted and indexed and tuned anew when more than this share of its rows
    lies outside its indexes. Until then LanceDB scans those rows beside them (exactly) and only the recall is
    verified: small additions stay small work. Ours: each document is indexed again about ten times in the
    life of a table that grows forever."""
    max_index_bytes: int = Field(default=8_000_000_000, ge=1)
    """Memory that the vector indexes may take together, bytes. Ours."""
