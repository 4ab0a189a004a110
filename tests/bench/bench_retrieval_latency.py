"""One retrieval for a user's prompt: milliseconds from its words to the segments, by retriever.

    python tests/bench/bench_retrieval_latency.py [--documents 100000] [--queries 50] [--k 2] [--threads N]

A memory in LanceDB with an index on its ids, planted vectors, texts of ten words drawn by Zipf's law out of
20,000, tiny pictures. Opening it (arrays on disk, the index of words, vectors in memory, a first question) is
timed by itself; the CLIP vector of the words is part of a retrieval.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from infra.clip import ClipConfig, load_clip
from pipeline.memory import open_memory
from pipeline.memory.build_index.index import IndexConfig
from pipeline.memory.retrieve import RETRIEVERS, RetrieveConfig
from pipeline.prompts.user_prompt import PromptRetriever
from tests.bench.bench_scale import planted_rows
from tests.pipeline.memory.memory_tables import make_memory

CHUNK, WORDS, TEXT_WORDS = 20_000, 20_000, 10
LIMIT_MS = 50.0


def texts_of(start: int, count: int) -> list[str]:
    """Ten words each, the n-th commonest with a probability of about 1 / n."""
    random = np.random.default_rng([7, start])
    chances = 1 / np.arange(1, WORDS + 1)
    drawn = random.choice(WORDS, (count, TEXT_WORDS), p=chances / chances.sum())
    return [" ".join(f"word{number}" for number in row) for row in drawn]


def write_memory(uri: str, count: int, dim: int, model_hash: str) -> None:
    """A certified memory of one shard, as build-index makes it, without an index of its vectors."""
    rows = pa.concat_tables([planted_rows(at, min(CHUNK, count - at), dim) for at in range(0, count, CHUNK)])
    texts = [text for at in range(0, count, CHUNK) for text in texts_of(at, min(CHUNK, count - at))]
    place = rows.schema.get_field_index("text")
    rows = rows.set_column(place, rows.schema.field(place), pa.array(texts))
    index = IndexConfig(min_rows=count + 1)
    make_memory(uri, rows, shard_rows=count, unit_rows=CHUNK, model_hash=model_hash, index=index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--clip", default="offline")
    parser.add_argument(
        "--threads", type=int, help="of torch; 1 where others use the machine: CPU ms then tell"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    clip = load_clip(ClipConfig(name=options.clip))
    queries = texts_of(options.documents + 1, options.queries)
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.perf_counter()
        write_memory(folder, options.documents, clip.dim, clip.model_hash)
        print(f"{options.documents:,} documents of {clip.dim} dimensions, written in {since(started_s):.0f} s")
        memory = open_memory(folder)
        print(
            f"{'retriever':10} {'open s':>7} {'median ms':>10} {'p95 ms':>8} {'CPU ms':>8} {'of it CLIP':>11}"
        )
        for name in RETRIEVERS:
            started_s = time.perf_counter()
            ask = PromptRetriever(memory, RetrieveConfig(retriever=name, k=options.k), clip)
            ask([queries[0]])
            opened_s = since(started_s)
            cpu_s = time.process_time()
            took = 1e3 * times_s(ask, queries)
            cpu_ms = 1e3 * (time.process_time() - cpu_s) / len(queries)
            encode = times_s(clip.encode_texts, queries)
            of_it = 1e3 * float(np.median(encode)) if RETRIEVERS[name].needs_vectors else 0.0
            median, late = np.median(took), np.quantile(took, 0.95)
            fate = "" if median <= LIMIT_MS else f"  above {LIMIT_MS:g} ms"
            print(f"{name:10} {opened_s:7.1f} {median:10.1f} {late:8.1f} {cpu_ms:8.1f} {of_it:11.1f}{fate}")


def since(started_s: float) -> float:
    return time.perf_counter() - started_s


def times_s(work: Callable[[list[str]], object], queries: list[str]) -> np.ndarray:
    """Seconds that each query takes by itself."""
    found = []
    for query in queries:
        started_s = time.perf_counter()
        work([query])
        found.append(since(started_s))
    return np.array(found)


if __name__ == "__main__":
    main()
