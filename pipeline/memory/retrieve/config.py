"""How a caption finds its documents: what may be told."""

from typing import Literal

from pydantic import Field

from infra.config import Config
from pipeline.memory.retrieve.bm25 import K1, B
from pipeline.memory.retrieve.fuse import RRF_K

Retriever = Literal["bm25", "clip", "hybrid"]


class RetrieveConfig(Config):
    """How a caption finds its documents."""

    retriever: Retriever = "bm25"
    """bm25 is what VIMI does; clip and hybrid are ours."""
    k: int = Field(default=5, ge=0)
    """Documents stored in each prompt, best first; how many are used is drawn when training loads the
    row. VIMI's k is not published; RA-CM3 uses up to 2, CM3Leon draws 3 of a list, RAGME takes 10."""
    depth: int = Field(default=100, ge=1)
    """Candidates that the guard chooses from; deepened by itself where too few survive. Ours."""
    k1: float = Field(default=K1, ge=0)
    """BM25's saturation of repeated words. Default of Lucene, Tantivy and Lance."""
    b: float = Field(default=B, ge=0, le=1)
    """BM25's length normalisation. Default of Lucene, Tantivy and Lance."""
    rrf_k: int = Field(default=RRF_K, ge=0)
    """Constant of reciprocal rank fusion (Cormack et al. 2009)."""
    bm25_weight: float = Field(default=1.0, ge=0)
    """Weight of the BM25 list in hybrid; 1 each is the paper's plain sum."""
    clip_weight: float = Field(default=1.0, ge=0)
    """Weight of the CLIP list in hybrid."""
    against: Literal["document", "image", "text"] = "document"
    """Which vector of a document the caption is compared with. RA-CM3: document, the unit mean of
    picture and text."""
    query_dropout_frac: float = Field(default=0.0, ge=0, lt=1)
    """Share of the caption's words dropped from the query (RA-CM3 trains with 0.2; VIMI: not said)."""
    max_chosen_similarity: float = Field(default=0.9, gt=0, le=1)
    """A candidate whose picture is closer (cosine) than this to one already chosen is skipped.
    RA-CM3: 0.9. 1 = never."""
    mmr_lambda: float = Field(default=1.0, ge=0, le=1)
    """Maximal marginal relevance (Carbonell & Goldstein 1998): 1 = by score alone."""
    engine: Literal["auto", "arrays", "partitions", "lance"] = "auto"
    """arrays = exact, in memory; partitions = in memory too, where vectors are looked for in the nearest
    partitions only, held to `recall` (augment's batches; `vimi-data search` is exact then); lance = the
    table's own indexes; auto = arrays up to `max_exact_documents`."""
    recall: float = Field(default=0.98, gt=0, le=0.999)
    """With partitions: the least that the 95 % lower bound of recall@10 may be. Ours."""
    max_exact_documents: int = Field(default=3_000_000, ge=0)
    """Memories beyond this are searched through LanceDB's indexes (ours: about 3 GB per machine and
    million documents at 512 dimensions)."""
