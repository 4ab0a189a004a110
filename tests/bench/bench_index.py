"""Vector indexes: what ours costs and reaches beside LanceDB's defaults and faiss HNSW, on the same vectors.

    python tests/bench/bench_index.py [--rows 1000 10000 100000] [--dim 512] [--profile profile.json]
    python tests/bench/bench_index.py --vectors embeddings.npy        # real ones, float `n d`

Without --vectors they are planted: 1,000 crowded clusters. LanceDB's own loop asks its index one query at a
time with the same dials. "in memory" is what augment's join has: exact products. faiss HNSW (M 32, in memory,
batches, all cores) is asked at the least efSearch that reaches the declared recall on the same queries;
without faiss, or with --no-hnsw, its columns stay empty.
--no-pq leaves out LanceDB's default IVF_PQ, whose build takes minutes from 10^6 on.
All batches of queries hold 256; the best of three runs counts.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.memory import sample
from pipeline.memory.index import build_text_index, build_vector_index, make_index
from pipeline.memory.recall import Exact, IndexConfig, exact_neighbours, hits, unit
from pipeline.memory.retrieve.dense import Dense
from pipeline.memory.store import stream_vectors, vectors_arrow
from pipeline.memory.vectors import Setting, vector_search
from pipeline.report.estimate import MEASURED

COLUMN, CHUNK, NUM_QUERIES, K = "image_embedding", 50_000, 256, 10
WORDS = ["dog", "runs", "green", "grass", "near", "old", "red", "house", "by", "water", "boat", "hill"]
NOTHING = float("nan")


def planted(count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors around 1,000 centres; noise as long as the centres, as in CLIP's crowded cone."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(1000, dim)).astype(np.float32)
    noise = random.standard_normal((count, dim), np.float32)
    return unit(centres[random.integers(0, 1000, count)] + noise)


def blocks(rows: int, dim: int, real: np.ndarray | None) -> Iterator[np.ndarray]:
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        yield unit(real[start : start + count]) if real is not None else planted(count, dim, 100 + start)


def record_batches(rows: int, dim: int, real: np.ndarray | None) -> Iterator[pa.RecordBatch]:
    random, start = np.random.default_rng(1), 0
    for vectors in blocks(rows, dim, real):
        texts = [" ".join(words) for words in random.choice(WORDS, (len(vectors), 8))]
        ids = [f"{n:024d}" for n in range(start, start + len(vectors))]
        start += len(vectors)
        yield pa.record_batch({"doc_id": ids, "text": texts, COLUMN: vectors_arrow(vectors)})


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started_s = time.perf_counter()
    value = function()
    return time.perf_counter() - started_s, value


def one_size(rows: int, dim: int, real: np.ndarray | None, options: argparse.Namespace) -> dict[str, Any]:
    import lancedb

    sample.NUM_QUERIES = options.queries
    config = IndexConfig(kind="rq", columns=(COLUMN,))
    with tempfile.TemporaryDirectory() as folder:
        schema = next(record_batches(1, dim, None if real is None else real)).schema
        reader = pa.RecordBatchReader.from_batches(schema, record_batches(rows, dim, real))
        write_s, table = timed(lambda: lancedb.connect(folder).create_table("documents", reader))
        text_s, _ = timed(lambda: build_text_index(table))
        whole_s, (facts, measured, _) = timed(lambda: build_vector_index(table, COLUMN, config))
        own = planted(NUM_QUERIES, dim, 2) if real is None else unit(real[:: max(1, rows // NUM_QUERIES)])
        queries, setting = own[:NUM_QUERIES], Setting(**facts["setting"])
        names = [
            f"{n * max(1, rows // NUM_QUERIES):024d}" if real is not None else "" for n in range(len(queries))
        ]
        exact = exact_neighbours(stream_vectors(table, COLUMN), queries, names, k=K)
        batch_s, answers = best(lambda: vector_search(table, COLUMN, queries, setting, k=K + 1))
        loop_s, _ = timed(lambda: lance_loop(table, queries[:64], setting))
        reached = float(np.mean(hits(exact, [[d for d, _ in a] for a in answers], k=K)))
        found = {
            "rows": rows,
            "write_s": write_s,
            "text_index_s": text_s,
            "vector_index_s": measured["build_s"],
            "tune_and_verify_s": whole_s - measured["build_s"],
            "index_bytes": measured["index_bytes"],
            "recall_lower_95": min(v["recall_lower_95"] for v in facts["by_query"].values()),
            "recall": reached,
            "batch_qps": len(queries) / batch_s,
            "loop_qps": 64 / loop_s,
            "setting": facts["setting"],
        }
        found |= in_memory(rows, dim, real, exact)
        if not options.no_hnsw:
            found |= faiss_hnsw(rows, dim, real, exact, config.recall)
        return found | ({} if options.no_pq or rows < 3000 else default_pq(table, exact))


def best(function: Callable[[], Any]) -> tuple[float, Any]:
    return min((timed(function) for _ in range(3)), key=lambda run: run[0])


def in_memory(rows: int, dim: int, real: np.ndarray | None, exact: Exact) -> dict[str, float]:
    """The arrays of augment's join, where one machine multiplies them in reasonable time."""
    if rows > 200_000:
        return {}
    vectors = np.empty((rows, dim), np.float16)
    for number, block in enumerate(blocks(rows, dim, real)):
        vectors[number * CHUNK : number * CHUNK + len(block)] = block
    search = Dense(vectors).search
    batch_s, found = best(lambda: search(exact.queries, K + 1))
    answers = [[f"{n:024d}" for n in one.docs] for one in found]
    return {"exact_qps": len(answers) / batch_s, "exact_recall": float(np.mean(hits(exact, answers, k=K)))}


def lance_loop(table: Any, queries: np.ndarray, setting: Setting) -> None:
    """As LanceDB's documentation asks: one query, one call."""
    for query in queries:
        asked = table.search(query, vector_column_name=COLUMN).distance_type("cosine")
        asked = asked.nprobes(setting.nprobes).refine_factor(setting.refine or 1)
        asked.limit(K).select(["doc_id", "_distance"]).to_arrow()


def default_pq(table: Any, exact: Exact) -> dict[str, float]:
    """LanceDB's own default index, asked with its own defaults."""
    seconds, _ = timed(lambda: make_index(table, COLUMN, Setting("pq", num_bits=8)))
    plain = Setting("pq", nprobes=20)
    answers = [[d for d, _ in a] for a in vector_search(table, COLUMN, exact.queries, plain, k=K + 1)]
    return {"default_pq_s": seconds, "default_pq_recall": float(np.mean(hits(exact, answers, k=K)))}


def faiss_hnsw(rows: int, dim: int, real: np.ndarray | None, exact: Exact, recall: float) -> dict[str, float]:
    """The graph of faiss in memory, at the least effort that reaches this recall."""
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    index: Any = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 100
    build_s, _ = timed(lambda: [index.add(block) for block in blocks(rows, dim, real)])
    qps = found = NOTHING
    for effort in (16, 32, 64, 128, 256, 512, 1024):
        index.hnsw.efSearch = effort
        seconds, (_, numbers) = best(lambda: index.search(exact.queries, K + 1))
        answers = [[f"{n:024d}" for n in row] for row in numbers]
        qps, found = len(answers) / seconds, float(np.mean(hits(exact, answers, k=K)))
        if found >= recall:
            break
    return {"hnsw_s": build_s, "hnsw_qps": qps, "hnsw_recall": found}


def show(r: dict[str, Any], dim: int) -> None:
    qps, build_s = r["batch_qps"], r["vector_index_s"]
    print(f"{r['rows']:,} x {dim}: written in {r['write_s']:.2f} s, BM25 {r['text_index_s']:.2f} s")
    print(f"  ours: index {build_s:.2f} s, {r['index_bytes'] / 1e6:.0f} MB,", end=" ")
    print(f"tuned and verified in {r['tune_and_verify_s']:.1f} s")
    print(f"    recall@{K} {r['recall']:.4f}, at least {r['recall_lower_95']:.4f}; {qps:,.0f} q/s")
    print(f"  LanceDB's loop: {r['loop_qps']:,.0f} q/s; ours {qps / r['loop_qps']:.1f}x (goal above 1)")
    if "exact_qps" in r:
        times = r["exact_qps"] / r["loop_qps"]
        print(f"  in memory, exact: {r['exact_qps']:,.0f} q/s, {times:.1f}x LanceDB's loop")
    if "hnsw_s" in r:
        print(
            f"  faiss HNSW: index {r['hnsw_s']:.1f} s, recall {r['hnsw_recall']:.4f}, {r['hnsw_qps']:,.0f} q/s;"
        )
        print(f"    exact in memory {r.get('exact_qps', NOTHING) / r['hnsw_qps']:.2f}x")
    if "default_pq_s" in r:
        times = r["default_pq_s"] / build_s
        print(f"  IVF_PQ: index {r['default_pq_s']:.1f} s, {times:.0f}x ours (goal 20);", end=" ")
        print(f"recall {r['default_pq_recall']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vectors", help=".npy of real embeddings")
    parser.add_argument("--queries", type=int, default=1000, help="held-out queries of the verification")
    parser.add_argument("--no-pq", action="store_true")
    parser.add_argument("--no-hnsw", action="store_true")
    parser.add_argument("--profile", help="add the measurements to this file, for `vimi-data plan`")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    real = None if options.vectors is None else np.load(options.vectors)
    sizes = options.rows if real is None else [len(real)]
    dim = options.dim if real is None else real.shape[1]
    results = []
    for rows in sizes:
        r = one_size(rows, dim, real, options)
        results.append(r)
        show(r, dim)
    if options.profile:
        write_profile(Path(options.profile), results, dim)


def write_profile(place: Path, results: list[dict[str, Any]], dim: int) -> None:
    """What `vimi-data plan` fits its laws to; sizes that the file has already are replaced, others stay."""
    there = json.loads(place.read_text()) if place.exists() else {}
    runs = {run["rows"]: run for run in there.get("index", [])}
    names = ("rows", *MEASURED, "index_bytes", "recall", "recall_lower_95")
    runs |= {r["rows"]: {n: round(r[n], 4) for n in names} for r in results}
    machine = {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "dim": dim,
        "lancedb": version("lancedb"),
        "what": "bench_index.py: planted vectors, one column, IVF_RQ",
    }
    profile = {**there, "machine": machine, "index": [runs[rows] for rows in sorted(runs)]}
    place.write_text(json.dumps(profile, indent=1) + "\n")


if __name__ == "__main__":
    main()
