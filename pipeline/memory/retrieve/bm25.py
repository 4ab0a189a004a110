"""BM25: captions against the documents' texts (what VIMI does), exact, for whole batches of captions.

    score(q, d) = sum over words w of q:  idf(w) * tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avgdl))
    idf(w)      = ln(1 + (N - df(w) + 0.5) / (df(w) + 0.5))

Robertson & Zaragoza (2009), eq. 3.15, with the non-negative idf of Lucene, Tantivy and Lance. A word that
stands twice in the query counts twice. N, df and avgdl are those of the whole memory, not of a shard. A word's
part of a score is a whole number of 2^-24ths: their sum is exact in whatever order words are met, so every
shard says the same of the same document.

Speed comes from MaxScore (Turtle & Flood, 1995): words are taken from the most to the least promising; once the
k-th best score is beyond what the remaining common words could still give, they are only looked up for the few
documents that are still in play. Nothing is approximated.
"""

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.memory.retrieve.analysis import Analysis, analyser
from pipeline.memory.retrieve.hits import NOTHING, Hits, ranked
from pipeline.memory.retrieve.retriever import Retriever, Searched

K1, B = 1.2, 0.75
"""Saturation and length normalisation: the defaults of Lucene, Tantivy and Lance."""
UNIT = 1 << 24
"""Parts of 1 that scores are counted in. Ours: 6e-8, and the largest part of a score still fits 32 bits."""


class Bm25(Retriever):
    """The caption is the query over the documents' texts."""

    needs_words = True

    def search(self, tile: Searched, texts: Sequence[str], vectors: np.ndarray, depth: int) -> list[list[Hits]]:
        return [tile.by_words(texts, depth)]


@dataclass(frozen=True)
class Statistics:
    """What BM25 knows of the whole memory."""

    hashes: np.ndarray  # uint64 [v] word hashes, ascending
    counts: np.ndarray  # int64 [v] documents that have the word
    documents: int
    """Documents with a word; one without counts as none, as in Lucene."""
    words: int
    """Words of all documents."""

    def idf(self, word: int) -> float:
        """Inverse document frequency of the word with this hash; it is in the memory."""
        count = int(self.counts[np.searchsorted(self.hashes, np.uint64(word))])
        return math.log1p((self.documents - count + 0.5) / (count + 0.5))

    @property
    def mean_length(self) -> float:
        return max(self.words / max(self.documents, 1), 1e-9)

    @classmethod
    def total(cls, parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> "Statistics":
        """Of all shards: (hashes, documents that have each, lengths of the documents), one at a time."""
        hashes, counts, documents, words = np.zeros(0, np.uint64), np.zeros(0, np.int64), 0, 0
        for some, df, lengths in parts:
            both, inverse = np.unique(np.concatenate([hashes, some]), return_inverse=True)
            counts = np.bincount(inverse, np.concatenate([counts, df]), len(both)).astype(np.int64)
            hashes, documents = both, documents + int(np.count_nonzero(lengths))
            words += int(np.asarray(lengths, np.int64).sum())
        return cls(hashes, counts, documents, words)


@dataclass(frozen=True)
class Postings:
    """A shard's inverted index, made of arrays alone, so that it can be memory-mapped."""

    hashes: np.ndarray  # uint64 [v] word hashes, ascending
    starts: np.ndarray  # int64 [v + 1] where each word's postings begin
    docs: np.ndarray  # int32 [p] rows of the shard, ascending for each word
    tf: np.ndarray  # uint16 [p] how often the word stands there
    lengths: np.ndarray  # int32 [n] words of each document

    @classmethod
    def build(cls, texts: Iterable[str | None], analysis: Analysis) -> "Postings":
        """Index `texts`; the number of a document is its place."""
        terms_of = analyser(analysis)
        vocabulary: dict[str, int] = {}
        stream, lengths = array("I"), array("I")
        for text in texts:
            found = terms_of(text or "")
            lengths.append(len(found))
            stream.extend([vocabulary.setdefault(word, len(vocabulary)) for word in found])
        hashes = np.fromiter((word_hash(word) for word in vocabulary), np.uint64, len(vocabulary))
        order = np.argsort(hashes)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        count = max(len(lengths), 1)
        doc = np.repeat(np.arange(len(lengths)), np.asarray(lengths))
        both = place[np.asarray(stream)] * count + doc
        both, tf = np.unique(both, return_counts=True)
        df = np.bincount(both // count, minlength=len(hashes))
        starts = np.concatenate([[0], np.cumsum(df)]).astype(np.int64)
        tf = np.minimum(tf, 2**16 - 1).astype(np.uint16)
        return cls(hashes[order], starts, (both % count).astype(np.int32), tf, np.asarray(lengths, np.int32))


class Index:
    """Answers queries over one shard's postings.

    Args:
        postings: of the shard.
        keys: uint64 `n`, what orders equal scores.
        statistics: of the whole memory.
        analysis: that the postings were made by.
    """

    def __init__(
        self, postings: Postings, keys: np.ndarray, statistics: Statistics, analysis: Analysis
    ) -> None:
        self.postings, self.keys, self.statistics = postings, keys, statistics
        self.terms_of = analyser(analysis)
        self.norm = K1 * (1 - B + B * postings.lengths / statistics.mean_length)
        self.scratch = np.zeros(len(keys), np.int64)
        self.known: dict[int, np.ndarray] = {}

    def search(self, texts: Sequence[str], depth: int, allowed: np.ndarray | None = None) -> list[Hits]:
        """The `depth` best documents of each query; fewer when fewer share a term with it.

        Args:
            texts: queries.
            depth: documents wanted of each.
            allowed: bool `n`, the documents that may be found; None = all.
        """
        return [self._search(self.terms_of(text), depth, allowed) for text in texts]

    def _search(self, query: list[str], depth: int, allowed: np.ndarray | None) -> Hits:
        terms, scratch = self._terms(query), self.scratch  # all zeros before and after
        rest = np.concatenate([np.cumsum([bound for bound, *_ in terms][::-1])[::-1], [0]])
        seen: list[np.ndarray] = [np.zeros(0, np.int32)]
        num_seen, bar, number = 0, -1, 0
        for number, (_, term, weight) in enumerate(terms):
            docs, impacts = self._span(term), self._impacts(term)
            if num_seen >= depth and 2 * len(docs) > num_seen:
                bar = _kth(scratch[np.concatenate(seen)], depth)
                if bar > rest[number]:
                    break  # a document not seen yet can't reach the first `depth`
            if allowed is not None:
                inside = allowed[docs]
                docs, impacts = docs[inside], impacts[inside]
            before = scratch[docs]
            seen.append(docs[before == 0])
            num_seen += len(seen[-1])
            scratch[docs] = before + weight * impacts.astype(np.int64)
        else:
            number = len(terms)
        docs = np.concatenate(seen)
        scores = scratch[docs]
        scratch[docs] = 0
        for place in range(number, len(terms)):
            if len(docs) > depth:
                bar = max(bar, _kth(scores, depth))
                alive = scores + rest[place] >= bar
                docs, scores = docs[alive], scores[alive]
            scores = scores + terms[place][2] * self._impacts_on(terms[place][1], docs)
        return ranked(docs, scores / UNIT, self.keys, depth) if len(docs) else NOTHING

    def _terms(self, query: list[str]) -> list[tuple[int, int, int]]:
        """(largest contribution, word number, times in the query), most promising first."""
        counts, hashes = Counter(query), self.postings.hashes
        wanted = np.fromiter((word_hash(word) for word in counts), np.uint64, len(counts))
        places = np.searchsorted(hashes, wanted)
        terms = [
            (int(self._impacts(int(place)).max()) * count, int(place), count)
            for place, value, count in zip(places, wanted, counts.values(), strict=True)
            if place < len(hashes) and hashes[place] == value
        ]
        return sorted(terms, key=lambda term: (-term[0], term[1]))

    def _span(self, term: int) -> np.ndarray:
        return self.postings.docs[self.postings.starts[term] : self.postings.starts[term + 1]]

    def _impacts(self, term: int) -> np.ndarray:
        """int32, the word's part of the score of each document of its postings; at least 1."""
        if term not in self.known:
            span = slice(self.postings.starts[term], self.postings.starts[term + 1])
            tf, norm = self.postings.tf[span].astype(np.float64), self.norm[self.postings.docs[span]]
            parts = self.statistics.idf(int(self.postings.hashes[term])) * tf * (K1 + 1) / (tf + norm)
            self.known[term] = np.maximum(np.rint(parts * UNIT), 1).astype(np.int32)
        return self.known[term]

    def _impacts_on(self, term: int, docs: np.ndarray) -> np.ndarray:
        """The word's part of the score of each of `docs`, 0 where it does not occur."""
        having = self._span(term)
        places = np.minimum(np.searchsorted(having, docs), len(having) - 1)
        return np.where(having[places] == docs, self._impacts(term)[places], 0).astype(np.int64)


def _kth(scores: np.ndarray, depth: int) -> int:
    """The `depth`-th largest score."""
    return int(np.partition(scores, len(scores) - depth)[len(scores) - depth])


@lru_cache(maxsize=1 << 16)
def word_hash(word: str) -> int:
    """64 bits that stand for a word, so that an index is made of arrays alone.

    Among a million words the chance of any collision is 3e-8.
    """
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
