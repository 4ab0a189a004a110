"""What counts as the same document, and what was found."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from pydantic import Field

from infra.config import Config


class DedupConfig(Config):
    """What counts as the same document, and what becomes of it."""

    mode: Literal["off", "report", "drop"] = "report"
    """report = list them in `duplicates.parquet`; drop = leave all but one of each group out, counted as
    filtered_duplicate or filtered_near_duplicate."""
    min_cosine: float | None = Field(default=None, gt=0, le=1)
    """Least cosine of two near-duplicates. None = calibrated to the encoder, from random pairs of this
    memory (`calibrate`): 0.94 (RAGME, for CLIP ViT vectors of clips) at a strong one."""
    max_phash_bits: int | None = Field(default=10, ge=0, le=64)
    """The perceptual hashes must also differ in at most this many of 64 bits; None = the cosine decides
    alone. Vectors tell what a picture is about, hashes whether it is the same picture: of 5.8 million
    pairs of 3,395 film stills, the offline CLIP put 36,568 above 0.94, and 21 of these had alike hashes;
    stills compressed and halved again stayed within 4 bits (measured). 10 is the guard's bound."""
    column: Literal["image_embedding", "document_embedding"] = "image_embedding"
    """Vectors that are compared; with document_embedding the texts must be alike too."""
    neighbours: int = Field(default=32, ge=1)
    """Nearest documents that are looked at of each, in tables beyond `exact_rows`. Ours."""
    exact_rows: int = Field(default=50_000, ge=0)
    """Tables up to this size are compared pair by pair by cosines, where those decide alone (about a minute at
    this size); up to four times as many by hashes. Ours."""


@dataclass(frozen=True)
class Duplicates:
    """The documents that repeat another one."""

    table: pa.Table
    """doc_id, kept (the document that stands for the group), reason (a Status), cosine."""
    min_cosine: float | None = None
    """The bound that was used."""

    @classmethod
    def none(cls) -> "Duplicates":
        return cls(SCHEMA.empty_table())

    @property
    def counts(self) -> dict[str, int]:
        reasons = self.table["reason"].to_pylist()
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


SCHEMA = pa.schema(
    [("doc_id", pa.string()), ("kept", pa.string()), ("reason", pa.string()), ("cosine", pa.float32())]
)
