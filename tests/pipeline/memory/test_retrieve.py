"""Retrieval: fast and batched, and still exactly what the slow definition says."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.memory import open_memory
from pipeline.memory.retrieve import RETRIEVERS
from pipeline.memory.retrieve.analysis import STOP_WORDS, Analysis, analyser, words
from pipeline.memory.retrieve.bm25 import K1, B, Index, Postings, Statistics
from pipeline.memory.retrieve.clip import Block, nearest
from pipeline.memory.retrieve.hits import Hits, flatten, merge
from pipeline.memory.tile import Tiles, ask_all
from pipeline.memory.vectors import cosines, spread
from tests.pipeline.memory.memory_tables import documents, make_memory, planted

WORDS = st.sampled_from(
    ["a", "b", "c", "d", "e", "the", "man", "dog", "rides", "running", "x1", "été", "猫が好き"]
)
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)


def numbered(count: int) -> np.ndarray:
    """Keys in order of number."""
    return np.arange(count, dtype=np.uint64)


def bm25(texts: Sequence[str | None], analysis: Analysis = "english") -> Index:
    """One shard of these texts."""
    made = Postings.build(texts, analysis)
    totals = Statistics.total([(made.hashes, np.diff(made.starts), made.lengths)])
    return Index(made, numbered(len(texts)), totals, analysis)


def dense(vectors: np.ndarray, queries: np.ndarray, depth: int, rows: int = 1000) -> list[Hits]:
    """The nearest, met in blocks of `rows`."""
    blocks = [Block.make(vectors[at : at + rows].astype(np.float16)) for at in range(0, len(vectors), rows)]
    return nearest(blocks, queries, numbered(len(vectors)), depth)


def slow_bm25(texts: list[str], query: str) -> dict[int, float]:
    """The definition, word by word: document -> score, for documents that share a word."""
    terms = analyser("english")
    bags = [Counter(terms(text)) for text in texts]
    there = sum(bool(bag) for bag in bags)
    mean = sum(sum(bag.values()) for bag in bags) / max(there, 1)
    scores: dict[int, float] = {}
    for word in terms(query):
        df = sum(word in bag for bag in bags)
        idf = math.log(1 + (there - df + 0.5) / (df + 0.5))
        for doc, bag in enumerate(bags):
            if word in bag:
                norm = K1 * (1 - B + B * sum(bag.values()) / mean)
                gain = idf * bag[word] * (K1 + 1) / (bag[word] + norm)
                scores[doc] = scores.get(doc, 0.0) + gain
    return scores


def same_up_to_ties(hits: Hits, scores: dict[int, float], depth: int) -> None:
    best = sorted(scores.values(), reverse=True)[:depth]
    assert len(hits) == len(best)
    np.testing.assert_allclose(hits.scores, best, rtol=1e-5)
    np.testing.assert_allclose(hits.scores, [scores[doc] for doc in hits.docs], rtol=1e-5)
    assert len(set(hits.docs.tolist())) == len(hits)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=40), query=TEXTS, depth=st.integers(1, 12))
def test_bm25_ranks_as_the_definition_does(texts: list[str], query: str, depth: int) -> None:
    hits = bm25(texts).search([query], depth)[0]
    same_up_to_ties(hits, slow_bm25(texts, query), depth)


def test_pruning_changes_nothing_on_a_large_index() -> None:
    """Zipf-distributed words: the common ones are mostly never walked."""
    random = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(3000)]
    weights = 1 / np.arange(1, 3001)
    weights /= weights.sum()
    texts = [" ".join(random.choice(vocabulary, 9, p=weights)) for _ in range(6000)]
    index = bm25(texts)
    queries = [" ".join(random.choice(vocabulary, 8, p=weights)) for _ in range(40)]
    for query, hits in zip(queries, index.search(queries, 10), strict=True):
        same_up_to_ties(hits, slow_bm25(texts, query), 10)


def test_equal_scores_come_in_order_of_document() -> None:
    hits = bm25(["red dog"] * 9).search(["dog"], 5)[0]
    assert hits.docs.tolist() == [0, 1, 2, 3, 4]


def test_a_batch_answers_as_its_queries_do_alone() -> None:
    texts = [f"word{i % 7} other{i % 3} thing" for i in range(50)]
    index, queries = bm25(texts), ["word1 thing", "other2", "", "nothing known", "word3 word3"]
    for query, hits in zip(queries, index.search(queries, 6), strict=True):
        alone = index.search([query], 6)[0]
        assert (alone.docs == hits.docs).all() and (alone.scores == hits.scores).all()


@pytest.mark.parametrize("analysis", ["none", "english", "german"])
def test_bm25_equals_lancedb_full_text_search(tmp_path: Path, analysis: Analysis) -> None:
    import lancedb
    from lancedb.index import FTS
    from lancedb.query import MatchQuery

    options = {
        "language": "English" if analysis == "none" else analysis.capitalize(),
        "stem": analysis != "none",
        "remove_stop_words": analysis == "english",
        "custom_stop_words": sorted(STOP_WORDS),
        "ascii_folding": False,
    }
    random = np.random.default_rng(1)
    vocabulary = "a the is in dogs dog's running runs run happily boats their kayaks Häuser café".split()  # noqa: SIM905
    texts = [" ".join(random.choice(vocabulary, random.integers(1, 12))) for _ in range(400)]
    table = lancedb.connect(tmp_path).create_table("t", pa.table({"n": range(400), "text": texts}))
    table.create_index("text", config=FTS(**options))  # pyright: ignore[reportArgumentType]
    index = bm25(texts, analysis)
    for _ in range(20):
        query = " ".join(random.choice(vocabulary, 5))
        match = MatchQuery(query, "text")  # type: ignore[call-arg]
        theirs = table.search(match, query_type="fts").limit(10).to_arrow()["_score"].to_numpy()
        np.testing.assert_allclose(index.search([query], 10)[0].scores, theirs, rtol=1e-4, err_msg=query)


@pytest.mark.parametrize(
    "text",
    ['"unbalanced', "a AND (b OR", "+must -not", "field:value^2", "wild* fuz~2 [a TO b]", "\\", "\0 x", "😀"],
)
def test_reserved_characters_are_harmless(text: str) -> None:
    index = bm25([text, "a b value x", "other"])
    hits, terms = index.search([text], 3)[0], analyser("english")
    assert len(hits) == len([t for t in (text, "a b value x") if set(terms(t)) & set(terms(text))])


def test_every_script_gives_words() -> None:
    assert words("Das Mädchen läuft, ÇA VA?") == ["das", "mädchen", "läuft", "ça", "va"]
    assert words("猫が走る") == ["猫が", "が走", "走る"]
    assert words("кот и собака") == ["кот", "и", "собака"]
    assert words("कुत्ता दौड़ता") == ["कुत्ता", "दौड़ता"]
    assert len(words("แมวกำลังวิ่ง")) > 3
    assert words("ﬁre ＡＢＣ") == ["fire", "abc"]  # compatibility forms
    for script in ("猫が走る", "кот бежит", "कुत्ता दौड़ता", "แมวกำลังวิ่ง", "قطة تجري"):
        index = bm25(["a cat runs", script, "another"])
        assert index.search([script], 1)[0].docs.tolist() == [1]


def test_english_is_analysed_as_lucene_does_and_other_languages_by_name() -> None:
    assert analyser("english")("The dog's two dogs ran in their happy gardens") == [
        *("dog", "two", "dog", "ran", "happi", "garden")
    ]
    assert analyser("none")("The dog's") == ["the", "dog", "s"]
    assert analyser("german")("Die Häuser") == ["die", "haus"]
    texts = ["there is a match in the rain and it is theirs", "kayaks on rivers", "dogs with their owners"]
    queries = ["there is a kayak in the river", "is it in the"]
    assert [hits.docs.tolist() for hits in bm25(texts).search(queries, 3)] == [[1], []]
    assert bm25(texts, "none").search(queries, 1)[0].docs.tolist() == [0]


def test_a_caption_of_ten_kilobytes_is_answered() -> None:
    index = bm25([f"word{i} thing" for i in range(100)])
    query = " ".join(f"word{i % 100} thing" for i in range(900))
    assert len(query) > 10_000
    assert len(index.search([query], 10)[0]) == 10


def test_an_empty_index_answers_nothing() -> None:
    for texts in ([], ["", None]):
        assert len(bm25(texts).search(["a"], 3)[0]) == 0
    assert len(dense(np.zeros((0, 8), np.float16), np.ones((1, 8), np.float32), 3)[0]) == 0


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 300),
    rows=st.sampled_from([3, 50, 1000]),
    dim=st.sampled_from([8, 32]),
    depth=st.integers(1, 40),
    spread_out=st.sampled_from([0.01, 0.3, 10.0]),
    seed=st.integers(0, 99),
)
def test_dense_search_is_exact(
    count: int, rows: int, dim: int, depth: int, spread_out: float, seed: int
) -> None:
    """Also for tight clusters, where the first pass's rounding alone can't tell documents apart."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=dim) + spread_out * random.normal(size=(count, dim))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    queries = random.normal(size=(3, dim)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for query, hits in zip(queries, dense(vectors, queries, depth, rows=rows), strict=True):
        scores = cosines(vectors, query).astype(np.float32)
        order = np.lexsort((np.arange(count), -scores))[:depth]
        assert hits.docs.tolist() == order.tolist()
        assert (hits.scores == scores[order]).all()


def test_dense_answers_do_not_depend_on_the_batch() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(500, 32)).astype(np.float16)
    queries = random.normal(size=(70, 32)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    whole = dense(vectors, queries, 9)
    for number in (0, 13, 69):
        alone = dense(vectors, queries[number : number + 1], 9, rows=number + 7)[0]
        assert (alone.docs == whole[number].docs).all() and (alone.scores == whole[number].scores).all()


@settings(max_examples=60, deadline=None)
@given(
    lists=st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), min_size=1, max_size=3),
    depth=st.integers(1, 20),
)
def test_fusion_is_the_sum_of_reciprocal_ranks(lists: list[list[int]], depth: int) -> None:
    hits = [
        [Hits(np.array(docs, np.int64), -np.arange(len(docs), dtype=float), np.array(docs, np.uint64))]
        for docs in lists
    ]
    expected: dict[int, float] = {}
    for docs in lists:
        for rank, doc in enumerate(docs, start=1):
            expected[doc] = expected.get(doc, 0.0) + 1 / (60 + rank)
    fused = RETRIEVERS["hybrid"].fuse(merge([flatten(hits)], 100), depth)
    best = sorted(expected.items(), key=lambda item: (-round(item[1], 12), item[0]))[:depth]
    np.testing.assert_allclose(fused["score"], [score for _, score in best])
    assert {d: round(s, 9) for d, s in zip(fused["doc"].tolist(), fused["score"], strict=True)} == {
        d: round(expected[d], 9) for d in fused["doc"].tolist()
    }


def test_answers_are_the_same_to_the_bit_however_the_memory_is_cut(tmp_path: Path) -> None:
    """Also of documents that are equal: ten of them show one picture with one text."""
    rows = documents(192, texts=[f"a {('red', 'blue')[n % 2]} ball {n % 20}" for n in range(192)])
    place = rows.schema.get_field_index("document_embedding")
    again = rows.column(place).take(pa.array([min(n, 182) for n in range(192)]))
    rows = rows.set_column(place, rows.schema.field(place), again)
    texts, queries = ["a red ball", "ball 7 7 blue", "zzz", "19"], planted(4, start=182)
    found: dict[str, set[bytes]] = {name: set() for name in RETRIEVERS}
    for shard_rows in (192, 28, 3):
        uri = str(tmp_path / str(shard_rows))
        make_memory(uri, rows, shard_rows=shard_rows)
        memory = open_memory(uri)
        assert len(memory.shards) == {192: 1, 28: 7, 3: 64}[shard_rows]
        tiles = Tiles(memory, "document", kept=64)
        for name, method in RETRIEVERS.items():
            found[name].add(ask_all(tiles, method, texts, queries, 9).tobytes())
    assert {name: len(answers) for name, answers in found.items()} == dict.fromkeys(RETRIEVERS, 1)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 25),
    k=st.integers(0, 6),
    bound=st.sampled_from([0.3, 0.6, 0.9, 1.0]),
    seed=st.integers(0, 50),
)
def test_chosen_documents_are_apart_and_the_best_there_are(count: int, k: int, bound: float, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(count, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen, skipped = spread(vectors, k, max_similarity=bound)
    assert len(chosen) == len(set(chosen)) <= k and chosen == sorted(chosen)
    assert 0 <= skipped <= count - len(chosen)
    for place, one in enumerate(chosen):
        for other in chosen[:place]:
            assert vectors[one] @ vectors[other] <= bound + 1e-6
    if len(chosen) < k:  # then nothing that was allowed is left over
        for place in set(range(count)) - set(chosen):
            assert max(vectors[place] @ vectors[c] for c in chosen) > bound - 1e-6
