"""The batched join against LanceDB's own ways, side by side.

python tests/bench/bench_join.py [--documents 100000] [--dim 512] [--queries 200]

Texts are drawn from a Zipf vocabulary, vectors around 300 centres (real CLIP vectors cluster too).
LanceDB gets a full-text index without stemming and an IVF index with `refine_factor=10`; its hybrid
query fuses by reciprocal rank, as ours does. Agreement is with an exhaustive search that prunes nothing.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.memory.retrieve.analysis import analyser
from pipeline.memory.retrieve.bm25 import Bm25, Hits, ranked
from pipeline.memory.retrieve.documents import Documents
from pipeline.memory.retrieve.indexes import ArrayIndex
from pipeline.memory.retrieve.retrievers import RETRIEVERS, reciprocal_rank

K, DEPTH = 10, 100


def corpus(documents: int, dim: int, queries: int) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    random = np.random.default_rng(0)
    vocabulary = np.array([f"w{i}" for i in range(30_000)])
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    weights /= weights.sum()
    sizes = random.integers(6, 15, documents + queries)
    drawn = random.choice(vocabulary, sizes.sum(), p=weights)
    texts = [" ".join(words) for words in np.split(drawn, np.cumsum(sizes)[:-1])]
    centres = random.normal(size=(300, dim))
    vectors = centres[random.integers(0, 300, documents + queries)]
    vectors = vectors + 0.9 * random.normal(size=vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return (
        texts[:documents],
        vectors[:documents].astype(np.float16),
        texts[documents:],
        vectors[documents:].astype(np.float32),
    )


def make_table(texts: list[str], vectors: np.ndarray, folder: str) -> Any:
    import lancedb
    from lancedb.index import FTS, IvfRq

    flat = pa.array(vectors.astype(np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    rows = pa.table({"n": range(len(texts)), "text": texts, "vector": column})
    table = lancedb.connect(folder).create_table("t", rows)
    table.create_index("text", config=FTS(stem=False, remove_stop_words=False, ascii_folding=False))
    table.create_index("vector", config=IvfRq(distance_type="dot", num_bits=1))
    return table


def text_query(text: str) -> Any:
    from lancedb.query import MatchQuery

    return MatchQuery(text, "text")  # type: ignore[call-arg]


def lance_text(table: Any, text: str) -> list[int]:
    query = table.search(text_query(text), query_type="fts").select(["n"])
    return query.limit(K).to_arrow()["n"].to_pylist()


def lance_hybrid(table: Any, text: str, vector: np.ndarray) -> list[int]:
    query = table.search(query_type="hybrid").vector(vector).text(text_query(text))
    query = query.distance_type("dot").refine_factor(10).select(["n"])
    return query.limit(K).to_arrow()["n"].to_pylist()


async def lance_async(folder: str, texts: list[str], vectors: np.ndarray) -> None:
    import lancedb

    table = await (await lancedb.connect_async(folder)).open_table("t")
    gate = asyncio.Semaphore(8)

    async def ask(text: str, vector: np.ndarray) -> None:
        async with gate:
            query = table.query().nearest_to(vector).distance_type("dot").refine_factor(10)
            await query.nearest_to_text(text_query(text)).select(["n"]).limit(K).to_arrow()

    await asyncio.gather(*(ask(t, v) for t, v in zip(texts, vectors, strict=True)))


def exhaustive(bm25: Bm25, vectors: np.ndarray, text: str, vector: np.ndarray) -> Hits:
    """BM25 with every posting of every word, all inner products, exact fusion."""
    scores = np.zeros(bm25.num_documents)
    for _, term, weight in bm25._terms(analyser(bm25.analysis)(text)):
        docs, impacts = bm25._postings(term)
        scores[docs] += weight * impacts
    found = np.flatnonzero(scores)
    products = vectors.astype(np.float32) @ vector
    every = np.arange(len(products), dtype=np.int32)
    return reciprocal_rank([ranked(found, scores[found], DEPTH), ranked(every, products, DEPTH)], K)


def rate(run: Callable[[], object], queries: int) -> float:
    run()
    best_s = min(_timed(run) for _ in range(3))
    return queries / best_s


def _timed(run: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    texts, vectors, asked, asked_vectors = corpus(options.documents, options.dim, options.queries)
    pairs = list(zip(asked, asked_vectors, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(texts, vectors, folder)
        bm25 = Bm25.build(texts)
        documents = Documents(pa.table({}), np.zeros(0), vectors, vectors, vectors, bm25)
        index = ArrayIndex(documents, "document")
        searches = {name: partial(RETRIEVERS[name].search, index) for name in ("bm25", "clip", "hybrid")}
        pool = ThreadPoolExecutor(4)
        count = len(asked)
        rates = {
            "LanceDB full text, loop": rate(lambda: [lance_text(table, t) for t in asked], count),
            "LanceDB full text, 4 threads": rate(
                lambda: list(pool.map(lambda t: lance_text(table, t), asked)), count
            ),
            "ours, bm25, top 10": rate(lambda: searches["bm25"](asked, asked_vectors, K), count),
            "ours, bm25, top 100": rate(lambda: searches["bm25"](asked, asked_vectors, DEPTH), count),
            "ours, clip, top 100": rate(lambda: searches["clip"](asked, asked_vectors, DEPTH), count),
            "LanceDB hybrid, loop": rate(lambda: [lance_hybrid(table, t, v) for t, v in pairs], count),
            "LanceDB hybrid, 4 threads": rate(
                lambda: list(pool.map(lambda p: lance_hybrid(table, *p), pairs)), count
            ),
            "LanceDB hybrid, async x 8": rate(
                lambda: asyncio.run(lance_async(folder, asked, asked_vectors)), count
            ),
            "ours, hybrid, top 100": rate(lambda: searches["hybrid"](asked, asked_vectors, DEPTH), count),
        }
        ours = searches["hybrid"](asked, asked_vectors, DEPTH)
        theirs = [lance_hybrid(table, t, v) for t, v in pairs]
    exact = [exhaustive(bm25, vectors, t, v) for t, v in pairs]
    print(f"{options.documents:,} documents x {options.dim}, {count} queries, best of 3 runs")
    for name, value in rates.items():
        print(f"{name:32} {value:10,.0f} queries/s")
    text_best = max(value for name, value in rates.items() if name.startswith("LanceDB full"))
    hybrid_best = max(value for name, value in rates.items() if name.startswith("LanceDB hybrid"))
    loop = rates["LanceDB full text, loop"]
    print(f"bm25, like for like (top 10): {rates['ours, bm25, top 10'] / loop:.1f} x LanceDB's loop,")
    print(f"                              {rates['ours, bm25, top 10'] / text_best:.1f} x LanceDB's best")
    print(f"hybrid: {rates['ours, hybrid, top 100'] / hybrid_best:.1f} x LanceDB's best")
    print(f"agreement@10 with exact fusion: ours {agreement(ours, exact):.4f}", end=", ")
    print(f"LanceDB {agreement([Hits(np.array(t), np.zeros(len(t))) for t in theirs], exact):.4f}")


def agreement(found: list[Hits], exact: list[Hits]) -> float:
    shared = [len(set(f.docs[:K].tolist()) & set(e.docs.tolist())) for f, e in zip(found, exact, strict=True)]
    return sum(shared) / sum(len(e) for e in exact)


if __name__ == "__main__":
    main()
