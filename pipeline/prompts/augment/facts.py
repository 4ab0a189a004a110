"""What the guard knows of clips and of documents, from their rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.memory.tile import clip_ids
from pipeline.prompts.exclusion import Exclusion, key, keys, source_name
from pipeline.prompts.guard import EVALUATION_SPLITS, GuardConfig, GuardedClip, GuardedDocuments

Row = dict[str, Any]


def excluded(rows: Sequence[Row], config: GuardConfig, exclusion: Exclusion) -> list[str | None]:
    """Why each clip may not be trained on; None = it may."""
    reasons: list[str | None] = []
    for row in rows:
        hashes = np.array([row["phash"] or 0], np.uint64)
        if (row["split"] or "").lower() in EVALUATION_SPLITS:
            reasons.append(f"split {row['split']}")
        elif row["clip_id"] in exclusion.ids:
            reasons.append("id in the exclusion file")
        elif row["source_sha256"] in exclusion.hashes:
            reasons.append("hash in the exclusion file")
        elif source_name(row["source_uri"] or "", config.source_pattern) in exclusion.sources:
            reasons.append("source in the exclusion file")
        elif _near(hashes, exclusion.phashes, config.max_hash_bits)[0]:
            reasons.append("picture near one in the exclusion file")
        else:
            reasons.append(None)
    return reasons


def guarded_clip(
    row: Row, phashes: Sequence[int], picture: np.ndarray | None, config: GuardConfig
) -> GuardedClip:
    """What the guard knows of one clip."""
    return GuardedClip(
        sha=key(row["source_sha256"]),
        source=key(source_name(row["source_uri"] or "", config.source_pattern)),
        start_s=row["start_s"] or 0.0,
        end_s=row["end_s"] or 0.0,
        phashes=np.array([row["phash"] or 0, *phashes], np.uint64),
        vector=picture,
    )


def guarded_documents(
    table: pa.Table, vectors: np.ndarray, config: GuardConfig, exclusion: Exclusion
) -> GuardedDocuments:
    """What the guard knows of documents of the memory.

    Args:
        table: with the columns doc_id, source_uri, source_sha256, start_s, end_s, split, phash; and clip_id or
            text.
        vectors: float `n d`, their unit picture embeddings; zero rows = none.
        config: the guard's.
        exclusion: what may not be shown.
    """
    uris = [uri or "" for uri in table["source_uri"].to_pylist()]
    shas = table["source_sha256"].to_pylist()
    names = [source_name(uri, config.source_pattern) for uri in uris]
    phashes = table["phash"].fill_null(0).to_numpy().astype(np.uint64)
    splits = [(split or "").lower() in EVALUATION_SPLITS for split in table["split"].to_pylist()]
    starts, ends = (table[name].fill_null(0.0).to_numpy() for name in ("start_s", "end_s"))
    evaluation = np.array(splits, bool)
    if exclusion:
        evaluation |= np.array([sha in exclusion.hashes for sha in shas], bool)
        evaluation |= np.array([name in exclusion.sources for name in names], bool)
        evaluation |= _near(phashes, exclusion.phashes, config.max_hash_bits)
    if exclusion.ids:
        evaluation |= _listed(table, exclusion)
    return GuardedDocuments(
        shas=keys(shas),
        sources=keys(names),
        start_s=starts,
        end_s=ends,
        phashes=phashes,
        vectors=vectors,
        evaluation=evaluation,
    )


def _listed(table: pa.Table, exclusion: Exclusion) -> np.ndarray:
    """Documents listed by their own id, or by the id of the clip that they were made from."""
    clips = table["clip_id"] if "clip_id" in table.schema.names else clip_ids(table)
    pairs = zip(table["doc_id"].to_pylist(), clips.to_pylist(), strict=True)
    return np.array([not exclusion.ids.isdisjoint(pair) for pair in pairs], bool)


def _near(phashes: np.ndarray, listed: tuple[int, ...], max_bits: int) -> np.ndarray:
    near = np.zeros(len(phashes), bool)
    for phash in listed if max_bits >= 0 else ():
        near |= np.bitwise_count(phashes ^ np.uint64(phash)) <= max_bits
    return near & (phashes != 0)
