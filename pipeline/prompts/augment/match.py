"""Finds the documents of each clip: search the memory, apply the guard, choose the best."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.memory import Memory
from pipeline.memory.retrieve import MAX_CHOSEN_SIMILARITY, RetrieveConfig
from pipeline.memory.retrieve.hits import merge
from pipeline.memory.tile import Tiles
from pipeline.memory.vectors import cosines, spread, vectors_numpy
from pipeline.prompts.augment.candidates import candidates, fused, guarded_candidates
from pipeline.prompts.augment.facts import guarded_clip
from pipeline.prompts.exclusion import Exclusion, keys, source_name
from pipeline.prompts.guard import (
    GuardConfig,
    GuardedClip,
    GuardedDocuments,
    Verdict,
    count,
    judge,
    similarity_bound,
)
from pipeline.schema import ORIGIN, Role

DEEPER = 64
"""How many times deeper the second look goes, where the guard left fewer than k. It is the last one: it meets
every shard once more, for this slice alone. Ours."""
LOW_SCORE = "low_score"
"""Reason of a document that would have been chosen, were its score not below `min_score`."""
READ_FIRST = 4  # times k candidates whose picture vectors are read at first
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

    @property
    def num_found(self) -> int:
        """Documents that the guard let pass, at most k; of them those of too low a score are not given."""
        return len(self.docs) + self.refused.get(LOW_SCORE, 0)


class Matcher:
    """Finds the documents of a batch of clips.

    Args:
        memory: an open memory.
        retrieve: how a caption finds its documents.
        guard: what is a leak; the bound on similar pictures is measured on the memory if it names none.
        exclusion: what may not be shown.
        kept: shards that stay open.
    """

    def __init__(
        self,
        memory: Memory,
        retrieve: RetrieveConfig,
        guard: GuardConfig,
        exclusion: Exclusion,
        *,
        kept: int = 1,
    ) -> None:
        self.memory, self.retrieve, self.exclusion = memory, retrieve, exclusion
        self.guard = guard.model_copy(update={"max_similarity": measured_bound(memory, guard)})
        self.tiles = Tiles(memory, retrieve.against, kept=kept)

    def match(
        self,
        rows: Sequence[Row],
        *,
        phashes: Sequence[Sequence[int]],
        pictures: Sequence[np.ndarray | None],
        captions: Sequence[np.ndarray | None],
        queries: np.ndarray | None,
        found: Sequence[np.ndarray] | None = None,
    ) -> list[Match]:
        """The documents of each clip.

        Args:
            rows: of a clips table.
            phashes: hashes of each clip's frames, besides the one in its row.
            pictures: float [d] unit image vector of each clip, where there is one.
            captions: float [d] unit text vector of each caption, where there is one.
            queries: float32 [n d] unit text vectors of the queries; None where the retriever needs none.
            found: each clip's candidates at the config's depth, if the join has them (`join.found`).

        Returns:
            One match a row, in order.
        """
        texts = [row["caption"] or "" for row in rows]
        clips = [
            guarded_clip(row, hashes, picture, self.guard)
            for row, hashes, picture in zip(rows, phashes, pictures, strict=True)
        ]
        vectors = np.zeros((len(rows), 0), np.float32) if queries is None else queries
        matches, total = [Match() for _ in rows], self.memory.num_documents
        todo = list(range(len(rows))) if self.retrieve.k and total else []
        for depth in (min(self.retrieve.depth, total), min(DEEPER * self.retrieve.depth, total)):
            if not todo:
                break
            if found is None:
                found = self.search([texts[i] for i in todo], vectors[todo], depth)
            clip, caption = [clips[i] for i in todo], [captions[i] for i in todo]
            short = []
            for i, rows_of, match in zip(todo, found, self._choose_all(clip, found, caption), strict=True):
                matches[i] = match
                if match.num_found < self.retrieve.k and len(rows_of) == depth < total:
                    short.append(i)
            todo, found = short, None
        return matches

    def search(self, texts: Sequence[str], vectors: np.ndarray, depth: int) -> list[np.ndarray]:
        """`CANDIDATE [m]` of each query, best first, of the whole memory."""
        method = self.retrieve.method
        parts = (
            candidates(tile, method, texts, vectors, depth, self.guard, self.exclusion) for tile in self.tiles
        )
        return fused(method, merge(parts, depth), len(texts), depth)

    def _choose_all(
        self,
        clips: Sequence[GuardedClip],
        found: Sequence[np.ndarray],
        captions: Sequence[np.ndarray | None],
    ) -> list[Match]:
        """Each clip's choice. Picture vectors are read of the first candidates, and of all where these don't
        do.
        """
        matches, todo, reach = [Match()] * len(clips), list(range(len(clips))), READ_FIRST * self.retrieve.k
        while todo:
            heads = [found[i][:reach] for i in todo]
            numbers = np.unique(np.concatenate([head["doc"] for head in heads]))
            table = self.memory.take(numbers.tolist(), ["image_embedding"])
            vectors = vectors_numpy(table["image_embedding"].combine_chunks())
            short = []
            for i, head in zip(todo, heads, strict=True):
                own = vectors[np.searchsorted(numbers, head["doc"])]
                matches[i] = self._choose(clips[i], head, own, captions[i])
                if matches[i].num_found < self.retrieve.k and len(head) < len(found[i]):
                    short.append(i)
            todo, reach = short, max(len(rows) for rows in found)
        return matches

    def _choose(
        self, clip: GuardedClip, rows: np.ndarray, vectors: np.ndarray, caption: np.ndarray | None
    ) -> Match:
        verdicts = judge(self.guard, clip, guarded_candidates(rows, vectors), np.arange(len(rows)))
        allowed = np.flatnonzero(verdicts == Verdict.ALLOWED)
        alike = max(MAX_CHOSEN_SIMILARITY, self.guard.max_similarity or 0.0)
        chosen, repeated = spread(vectors[allowed], self.retrieve.k, max_similarity=alike)
        last = int(allowed[max(chosen)]) if len(chosen) == self.retrieve.k else len(rows)
        places = np.array(
            [n for n in allowed[chosen] if self.retrieve.is_enough(float(rows["score"][n]))], np.int64
        )
        low = len(chosen) - len(places)
        refused = Counter(count(verdicts[:last])) + Counter({"repeated": repeated, LOW_SCORE: low})
        similarities: list[float | None] = [None] * len(places)
        if caption is not None:
            similarities = [float(x) for x in cosines(vectors[places], caption)]
        return Match(rows["doc"][places].tolist(), rows["score"][places].tolist(), similarities, dict(refused))


def measured_bound(memory: Memory, guard: GuardConfig) -> float:
    """The bound on similar pictures that the guard uses with this memory."""
    sample = memory.sample
    names = [source_name(uri or "", guard.source_pattern) for uri in sample["source_uri"].to_pylist()]
    none = np.zeros(len(sample))
    documents = GuardedDocuments(
        shas=keys(sample["source_sha256"].to_pylist()),
        sources=keys(names),
        start_s=none,
        end_s=none,
        phashes=none.astype(np.uint64),
        vectors=vectors_numpy(sample["image_embedding"].combine_chunks()),
        evaluation=none.astype(bool),
    )
    return similarity_bound(guard, documents)


def document_segments(match: Match, documents: Mapping[int, Row], retriever: str) -> list[dict[str, Any]]:
    """Retrieved text and picture of each document, best first (the order of VIMI's figure).

    Args:
        match: the documents of one prompt.
        documents: number -> its row of the memory (`shown`).
        retriever: its name.
    """
    found: list[dict[str, Any]] = []
    places = zip(match.docs, match.scores, match.similarities, strict=True)
    for rank, (number, score, similarity) in enumerate(places, start=1):
        row = documents[number]
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
        if row["image"]:
            found.append({"type": "image", "image": row["image"], **retrieved})
    return found


def shown(memory: Memory, matches: Sequence[Match]) -> dict[int, Row]:
    """The rows of all chosen documents, with their pictures."""
    numbers = sorted({number for match in matches for number in match.docs})
    rows = memory.take(numbers, ["doc_id", "text", "image", *ORIGIN[:4]]).to_pylist()
    return dict(zip(numbers, rows, strict=True))
