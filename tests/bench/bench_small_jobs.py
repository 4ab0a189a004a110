"""A small augment from a cold shell against an empty Ray Data job, each a process of its own.

python tests/bench/bench_small_jobs.py [--captions 1000] [--documents 10000] [--dim 512] [--runs 3]

The captions' clips are documents of the memory (the typical small case), targets are references: what
is measured is start-up, join, guard and shards, not video decoding.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from infra.claim import JOB_FILE
from infra.storage import Certificate, write_certificate, write_json
from pipeline.memory.commit import create_table
from pipeline.memory.index import build_text_index
from pipeline.memory.store import upsert, vectors_arrow, version_tag
from pipeline.schema import CLIPS, clip_id, doc_id, memory_schema
from pipeline.shards import write_shard

EMPTY = """
from infra.cluster import RayConfig, ray_session
with ray_session(RayConfig()):
    import ray.data
    ray.data.DataContext.get_current().enable_progress_bars = False
    print(ray.data.range(1).map_batches(lambda batch: batch).count())
"""
AUGMENT = """
import sys
from pipeline.prompts.augment import AugmentConfig, run
print(run(AugmentConfig.load(options={"clips": sys.argv[1], "memory": sys.argv[2], "out": sys.argv[3],
    "target.kind": "reference", "retrieve.retriever": sys.argv[4]})).num_out)
"""


def make(folder: Path, captions: int, documents: int, dim: int) -> tuple[str, str]:
    random = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(4000)])
    weights = 1 / np.arange(1, 4001)
    texts = [" ".join(random.choice(words, 10, p=weights / weights.sum())) for _ in range(documents)]
    rows = [row(number, text) for number, text in enumerate(texts)]
    clips = folder / "clips"
    entry = write_shard(str(clips / "part-00000.parquet"), rows[:captions], CLIPS)
    write_certificate(
        str(clips),
        Certificate(job="crawl", config_hash="x", num_in=captions, num_out=captions, files=[entry]),
    )
    return str(clips), make_memory(folder / "memory", rows, dim)


def row(number: int, text: str) -> dict[str, Any]:
    sha = f"{number:064x}"
    return dict.fromkeys(CLIPS.names) | {
        "clip_id": clip_id(sha, 0, 4, text),
        "media": "video",
        "caption": text,
        "source_uri": f"/corpus/{number}.mp4",
        "source_sha256": sha,
        "start_s": 0.0,
        "end_s": 4.0,
        "width_px": 320,
        "height_px": 180,
        "fps": 30.0,
        "phash": int(np.random.default_rng(number).integers(1, 1 << 63)),
        "status": "ok",
    }


def make_memory(out: Path, rows: list[dict[str, Any]], dim: int) -> str:
    random = np.random.default_rng(1)
    vectors = random.normal(size=(len(rows), dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sink = io.BytesIO()
    noise = random.integers(0, 255, (54, 96, 3), np.uint8)
    Image.fromarray(noise).resize((384, 216)).save(sink, "JPEG", quality=90)
    columns: dict[str, Any] = {name: [r[name] for r in rows] for name in CLIPS.names}
    columns["doc_id"] = [doc_id(r["source_sha256"], 0, 4, r["caption"]) for r in rows]
    columns |= {"text": columns["caption"], "image": [sink.getvalue()] * len(rows)}
    schema = memory_schema(dim)
    arrays = [
        vectors_arrow(vectors) if f.name.endswith("_embedding") else pa.array(columns[f.name], f.type)
        for f in schema
    ]
    table = create_table(str(out), dim)
    upsert(table, pa.Table.from_arrays(arrays, schema=schema))
    build_text_index(table)
    tag = version_tag(table, "drawn")
    table.tags.create(tag, table.version)
    facts = {"memory_version": tag, "model_hash": "drawn", "dim": dim}
    write_json(str(out / JOB_FILE), {"config": {"clip": {"name": "offline"}}})
    count = len(rows)
    write_certificate(
        str(out),
        Certificate(job="build-index", config_hash="x", num_in=count, num_out=count, facts=facts),
    )
    return str(out)


def seconds(code: str, *arguments: str) -> float:
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"empty Ray Data job": [], "bm25": [], "hybrid": []}
    with tempfile.TemporaryDirectory() as name:
        clips, memory = make(Path(name), options.captions, options.documents, options.dim)
        for run in range(options.runs):  # interleaved: a noisy machine troubles all alike
            times["empty Ray Data job"].append(seconds(EMPTY))
            for retriever in ("bm25", "hybrid"):
                out = f"{name}/{retriever}-{run}"
                times[retriever].append(seconds(AUGMENT, clips, memory, out, retriever))
    print(f"{options.captions:,} captions, {options.documents:,} documents, median of {options.runs}")
    empty_s = statistics.median(times["empty Ray Data job"])
    for name, found in times.items():
        middle_s = statistics.median(found)
        print(f"{name:20} {middle_s:6.1f} s   {middle_s / empty_s:5.2f} x empty")


if __name__ == "__main__":
    main()
