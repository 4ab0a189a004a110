"""BM25 over a memory's texts, exact, for whole batches of captions; numpy alone.

    score(q, d) = sum over words w of q:  idf(w) * tf (k1 + 1) / (tf + k1 (1 - b + b |d| / avgdl))
    idf(w)      = ln(1 + (N - df(w) + 0.5) / (df(w) + 0.5))

Robertson & Zaragoza (2009), eq. 3.15, with the non-negative idf of Lucene, Tantivy and Lance. A word
that stands twice in the query counts twice. Equal scores are ordered by document number.

Speed comes from MaxScore (Turtle & Flood, 1995): words are taken from the most to the least
promising; once the k-th best score is beyond what the remaining common words could still give, they
are only looked up for the few documents that are still in play. Nothing is approximated.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np

from pipeline.memory.retrieve.analysis import Analysis, analyser

K1, B = 1.2, 0.75
"""Saturation and length normalisation: the defaults of Lucene, Tantivy and Lance."""
MAX_WIDE, WIDE_FRAC = 64, 1 / 32
"""At most so many words, each in so large a share of the documents, are kept as full columns."""


@dataclass(frozen=True)
class Hits:
    """Ranked documents of one query, best first."""

    docs: np.ndarray  # int32 [n] document numbers, or bytes [n] document ids
    scores: np.ndarray  # float64 [n]

    def __len__(self) -> int:
        return len(self.docs)


def ranked(docs: np.ndarray, scores: np.ndarray, depth: int) -> Hits:
    """The `depth` best, equal scores in order of document."""
    if len(docs) > depth:
        bound = np.partition(scores, len(scores) - depth)[len(scores) - depth]
        inside = scores >= bound
        docs, scores = docs[inside], scores[inside]
    order = np.lexsort((docs, -scores))[:depth]
    return Hits(docs[order], scores[order].astype(np.float64))


@dataclass(frozen=True)
class Bm25:
    """An inverted index made of arrays, so that processes can share it memory-mapped."""

    hashes: np.ndarray  # uint64 [v] word hashes, ascending
    starts: np.ndarray  # int64 [v + 1] where each word's postings begin
    docs: np.ndarray  # int32 [p] document numbers, ascending for each word
    impacts: np.ndarray  # float32 [p] the word's whole contribution to that document's score
    bounds: np.ndarray  # float32 [v] largest impact of each word
    wide_words: np.ndarray  # int64 [m] the most common words, ...
    wide: np.ndarray  # float32 [m, n] ... with their impact on every document
    num_documents: int
    analysis: Analysis = "english"

    @classmethod
    def build(cls, texts: Iterable[str | None], analysis: Analysis = "english") -> Self:
        """Index `texts`; the number of a document is its place in the list."""
        terms_of = analyser(analysis)
        vocabulary: dict[str, int] = {}
        stream: list[int] = []
        lengths: list[int] = []
        for text in texts:
            found = terms_of(text or "")
            lengths.append(len(found))
            stream += [vocabulary.setdefault(word, len(vocabulary)) for word in found]
        count = len(lengths)
        hashes = np.fromiter((word_hash(word) for word in vocabulary), np.uint64, len(vocabulary))
        order = np.argsort(hashes)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        term = place[np.array(stream, np.int64)]
        doc = np.repeat(np.arange(count), lengths)
        keys, tf = np.unique(term * max(count, 1) + doc, return_counts=True)
        term, doc = keys // max(count, 1), keys % max(count, 1)
        df = np.bincount(term, minlength=len(hashes))
        there = max(np.count_nonzero(lengths), 1)  # a document without a term counts as none, as in Lucene
        idf = np.log1p((there - df + 0.5) / (df + 0.5))
        mean = max(sum(lengths) / there, 1e-9)
        norm = K1 * (1 - B + B * np.array(lengths, np.float64) / mean)
        impacts = (idf[term] * tf * (K1 + 1) / (tf + norm[doc])).astype(np.float32)
        starts = np.concatenate([[0], np.cumsum(df)]).astype(np.int64)
        bounds = np.maximum.reduceat(impacts, starts[:-1]) if len(hashes) else impacts
        common = np.argsort(-df, kind="stable")[:MAX_WIDE]
        common = np.sort(common[df[common] >= max(count * WIDE_FRAC, 1024)])
        wide = np.zeros((len(common), count), np.float32)
        for row, word in enumerate(common):
            span = slice(starts[word], starts[word + 1])
            wide[row, doc[span]] = impacts[span]
        return cls(hashes[order], starts, doc.astype(np.int32), impacts, bounds, common, wide, count, analysis)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that `Bm25(**arrays, num_documents=n)` takes back."""
        names = ("hashes", "starts", "docs", "impacts", "bounds", "wide_words", "wide")
        return {name: getattr(self, name) for name in names}

    def search(self, queries: Sequence[str], depth: int) -> list[Hits]:
        """The `depth` best documents of each query; fewer when fewer share a term with it."""
        scratch, terms_of = np.zeros(self.num_documents), analyser(self.analysis)
        return [self._search(terms_of(query), depth, scratch) for query in queries]

    def _search(self, query: list[str], depth: int, scratch: np.ndarray) -> Hits:
        """One query's terms; `scratch` is float64 [n], all zeros before and after."""
        terms = self._terms(query)
        rest = np.concatenate([np.cumsum([bound for bound, *_ in terms][::-1])[::-1], [0.0]])
        rest *= 1 + 1e-9  # the sums below are rounded; a bound must stay a bound
        seen: list[np.ndarray] = [np.zeros(0, np.int32)]
        num_seen, bar, number = 0, -math.inf, 0
        for number, (_, term, weight) in enumerate(terms):
            docs, impacts = self._postings(term)
            if num_seen >= depth and 2 * len(docs) > num_seen:
                bar = _kth(scratch[np.concatenate(seen)], depth)
                if bar > rest[number]:
                    break  # a document not seen yet can't reach the first `depth`
            before = scratch[docs]
            seen.append(docs[before == 0.0])
            num_seen += len(seen[-1])
            scratch[docs] = before + weight * impacts
        else:
            number = len(terms)
        touched = np.concatenate(seen)
        docs, scores = touched, scratch[touched]
        scratch[touched] = 0.0
        for place in range(number, len(terms)):
            if len(docs) > depth:
                bar = max(bar, _kth(scores, depth))
                alive = scores + rest[place] >= bar
                docs, scores = docs[alive], scores[alive]
            scores = scores + terms[place][2] * self._impacts_on(terms[place][1], docs)
        return ranked(docs, scores, depth)

    def _terms(self, query: list[str]) -> list[tuple[float, int, int]]:
        """(largest contribution, word number, times in the query), most promising first."""
        counts = Counter(query)
        wanted = np.fromiter((word_hash(word) for word in counts), np.uint64, len(counts))
        places = np.searchsorted(self.hashes, wanted)
        terms = [
            (float(self.bounds[place]) * count, int(place), count)
            for place, value, count in zip(places, wanted, counts.values(), strict=True)
            if place < len(self.hashes) and self.hashes[place] == value
        ]
        return sorted(terms, key=lambda term: (-term[0], term[1]))

    def _postings(self, term: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.starts[term], self.starts[term + 1])
        return self.docs[span], self.impacts[span]

    def _impacts_on(self, term: int, docs: np.ndarray) -> np.ndarray:
        """The word's contribution to each of `docs`, 0 where it does not occur."""
        row = int(np.searchsorted(self.wide_words, term))
        if row < len(self.wide_words) and self.wide_words[row] == term:
            return self.wide[row][docs]
        having, impacts = self._postings(term)
        if not len(having):
            return np.zeros(len(docs), np.float32)
        places = np.minimum(np.searchsorted(having, docs), len(having) - 1)
        return np.where(having[places] == docs, impacts[places], np.float32(0))


def _kth(scores: np.ndarray, depth: int) -> float:
    """The `depth`-th largest score."""
    return float(np.partition(scores, len(scores) - depth)[len(scores) - depth])


@lru_cache(maxsize=1 << 16)
def word_hash(word: str) -> int:
    """64 bits that stand for a word, so that an index is made of arrays alone.

    Among a million words the chance of any collision is 3e-8.
    """
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
