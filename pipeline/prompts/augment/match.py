"""Finds the documents of each clip: search the memory, apply the guard, choose the best."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.memory import Memory
from pipeline.memory.embed.worker import row_doc_id
from pipeline.memory.retrieve.bm25 import Hits
from pipeline.memory.retrieve.documents import Documents
from pipeline.memory.retrieve.indexes import Search, open_search
from pipeline.memory.retrieve.retrievers import MAX_CHOSEN_SIMILARITY, RetrieveConfig
from pipeline.memory.vectors import cosines, spread
from pipeline.prompts.exclusion import Exclusion, key, keys, source_name
from pipeline.prompts.guard import (
    EVALUATION_SPLITS,
    GuardConfig,
    GuardedClip,
    GuardedDocuments,
    Verdict,
    count,
    judge,
    similarity_bound,
)
from pipeline.schema import ORIGIN, Role, clip_id

DEEPER = 8  # how many times deeper the second look goes, where the guard left fewer than k
Row = dict[str, Any]


@dataclass(frozen=True)
class Match:
    """The documents that one clip gets, best first."""

    docs: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    similarities: list[float | None] = field(default_factory=list)
    """Cosine of the caption's and the picture's CLIP vectors."""
    refused: dict[str, int] = field(default_factory=dict)
    """Reason -> candidates that were refused before the last one was chosen."""


def own_documents(rows: Sequence[Row], documents: Documents) -> np.ndarray:
    """int64 number of the document that was made from each clip, -1 where there is none."""
    return documents.find([row_doc_id(row) for row in rows])


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


def guarded_documents(
    table: pa.Table, vectors: np.ndarray, config: GuardConfig, exclusion: Exclusion
) -> GuardedDocuments:
    """What the guard knows of documents of the memory.

    Args:
        table: with the columns doc_id, text, source_uri, source_sha256, start_s, end_s, split, phash.
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
    columns = ("doc_id", "text", "source_uri", "source_sha256", "start_s", "end_s")
    found = []
    for row in table.select(columns).to_pylist():
        source = row["source_sha256"] or row["source_uri"]
        clip = clip_id(source, row["start_s"] or 0.0, row["end_s"] or 0.0, row["text"])
        found.append(row["doc_id"] in exclusion.ids or clip in exclusion.ids)
    return np.array(found, bool)


def _near(phashes: np.ndarray, listed: tuple[int, ...], max_bits: int) -> np.ndarray:
    near = np.zeros(len(phashes), bool)
    for phash in listed if max_bits >= 0 else ():
        near |= np.bitwise_count(phashes ^ np.uint64(phash)) <= max_bits
    return near & (phashes != 0)


@dataclass(frozen=True)
class Matcher:
    """Finds the documents of a batch of clips. All of it is a function of its arguments."""

    retrieve: RetrieveConfig
    guard: GuardConfig
    documents: Documents
    guarded: GuardedDocuments
    search: Search

    def match(
        self,
        rows: Sequence[Row],
        *,
        phashes: Sequence[Sequence[int]],
        pictures: Sequence[np.ndarray | None],
        captions: Sequence[np.ndarray | None],
        queries: np.ndarray | None,
    ) -> list[Match]:
        """The documents of each clip.

        Args:
            rows: of a clips table.
            phashes: hashes of each clip's frames, besides the one in its row.
            pictures: float [d] unit image vector of each clip, where there is one.
            captions: float [d] unit text vector of each caption, where there is one.
            queries: float32 [n d] unit text vectors of the queries; None where the retriever needs none.

        Returns:
            One match a row, in order.
        """
        texts = [row["caption"] or "" for row in rows]
        clips = [
            guarded_clip(row, hashes, picture, self.guard)
            for row, hashes, picture in zip(rows, phashes, pictures, strict=True)
        ]
        matches = [Match() for _ in rows]
        todo = list(range(len(rows))) if self.retrieve.k and len(self.documents) else []
        depth = min(self.retrieve.depth, len(self.documents))
        while todo:
            wanted = None if queries is None else queries[todo]
            found = self.search([texts[i] for i in todo], wanted, depth)
            short = []
            for i, hits in zip(todo, found, strict=True):
                matches[i] = self._choose(clips[i], hits, captions[i])
                if len(matches[i].docs) < self.retrieve.k and len(hits) == depth < len(self.documents):
                    short.append(i)
            todo, depth = short, min(depth * DEEPER, len(self.documents))
        return matches

    def _choose(self, clip: GuardedClip, hits: Hits, caption: np.ndarray | None) -> Match:
        verdicts = judge(self.guard, clip, self.guarded, hits.docs)
        allowed = np.flatnonzero(verdicts == Verdict.ALLOWED)
        docs, scores = hits.docs[allowed], hits.scores[allowed]
        vectors = self.documents.image[docs]
        alike = max(MAX_CHOSEN_SIMILARITY, self.guard.max_similarity or 0.0)
        chosen, repeated = spread(vectors, self.retrieve.k, max_similarity=alike)
        last = int(allowed[max(chosen)]) if len(chosen) == self.retrieve.k else len(hits)
        refused = Counter(count(verdicts[:last])) + Counter({"repeated": repeated})
        similarities: list[float | None] = [None] * len(chosen)
        if caption is not None:
            similarities = [float(x) for x in cosines(vectors[chosen], caption)]
        return Match(
            [int(docs[c]) for c in chosen],
            [float(scores[c]) for c in chosen],
            similarities,
            dict(refused),
        )


def open_matcher(
    retrieve: RetrieveConfig, guard: GuardConfig, exclusion: Exclusion, documents: Documents, memory: Memory
) -> Matcher:
    """The matcher of one memory, with the bound on similar pictures that it tells.

    Raises:
        ConfigError: the table lacks an index.
    """
    guarded = guarded_documents(documents.table, documents.image, guard, exclusion)
    guard = guard.model_copy(update={"max_similarity": similarity_bound(guard, guarded)})
    return Matcher(retrieve, guard, documents, guarded, open_search(retrieve, documents, memory))


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


def document_segments(
    match: Match, documents: Documents, pictures: Mapping[str, bytes], retriever: str
) -> list[dict[str, Any]]:
    """Retrieved text and picture of each document, best first (the order of VIMI's figure).

    Args:
        match: the documents of one prompt.
        documents: of the memory.
        pictures: doc_id -> JPEG of the chosen ones.
        retriever: its name.
    """
    found: list[dict[str, Any]] = []
    rows = documents.table.take(pa.array(match.docs, pa.int64())).to_pylist()
    places = zip(rows, match.scores, match.similarities, strict=True)
    for rank, (row, score, similarity) in enumerate(places, start=1):
        document = {
            "doc_id": row["doc_id"],
            "retriever": retriever,
            "rank": rank,
            "score": score,
            "clip_similarity": similarity,
            **{name: row[name] for name in ORIGIN[:4]},
        }
        retrieved = {"role": Role.RETRIEVED.value, "document": document}
        found.append({"type": "text", "text": row["text"] or "", **retrieved})
        if pictures.get(row["doc_id"]):
            found.append({"type": "image", "image": pictures[row["doc_id"]], **retrieved})
    return found
