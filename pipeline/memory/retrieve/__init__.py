"""How a caption finds its documents: retrievers by name, over shards that answer to words and vectors.

    bm25     the caption is the query over the documents' texts (what VIMI does)
    clip     the caption's CLIP vector against the documents' vectors (RA-CM3)
    hybrid   both, merged by reciprocal rank fusion

Another one is an entry of `RETRIEVERS`; the config, the commands and the join ask for it by its name.
"""

from typing import Literal

from pydantic import Field, field_validator

from infra.config import Config
from pipeline.memory.retrieve.bm25 import Bm25
from pipeline.memory.retrieve.clip import Clip
from pipeline.memory.retrieve.hybrid import Hybrid
from pipeline.memory.retrieve.retriever import Retriever

RETRIEVERS: dict[str, Retriever] = {"bm25": Bm25(), "clip": Clip(), "hybrid": Hybrid()}
MAX_CHOSEN_SIMILARITY = 0.9
"""A candidate whose picture is closer (cosine) than this to one already chosen is skipped. RA-CM3: 0.9, as for
copies of the clip; so where the memory says that only more is a copy (`guard.similarity_bound`), that counts:
to a small CLIP half of all simple pictures are closer than 0.9."""


class RetrieveConfig(Config):
    """How a caption finds its documents."""

    retriever: str = "bm25"
    """bm25, clip, hybrid, or another name of `RETRIEVERS`. bm25 is what VIMI does; clip and hybrid are ours."""
    k: int = Field(default=5, ge=0, le=1000)
    """Documents stored in each prompt, best first; how many are used is drawn when training loads the
    row. VIMI's k is not published; RA-CM3 uses up to 2, CM3Leon draws 3 of a list, RAGME takes 10."""
    depth: int = Field(default=100, ge=1, le=100_000)
    """Candidates that the guard chooses from, and hybrid fuses; where fewer than k survive, it looks once more,
    64 times as deep. Ours."""
    min_score: float | None = None
    """A document that scores lower is not given, so a caption may get fewer than k, or none; null = the k best,
    however little they fit. In the retriever's own unit, as prompts and the page of a report show it: bm25 sums
    over shared words, rare ones weigh more, a longer memory gives more; clip is a cosine; hybrid is at most
    2 / 61. Which value parts what fits from what doesn't is seen on one's own corpus. VIMI names none."""
    against: Literal["document", "image", "text"] = "document"
    """Which vector of a document the caption is compared with. RA-CM3: document, the unit mean of
    picture and text."""

    @field_validator("retriever")
    @classmethod
    def _is_registered(cls, value: str) -> str:
        if value not in RETRIEVERS:
            raise ValueError(f"no such retriever; legal: {', '.join(RETRIEVERS)}")
        return value

    @property
    def method(self) -> Retriever:
        return RETRIEVERS[self.retriever]

    def is_enough(self, score: float) -> bool:
        return self.min_score is None or score >= self.min_score
