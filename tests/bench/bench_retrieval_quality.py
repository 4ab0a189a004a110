"""Does retrieval find fitting pictures? Panda captions against MSR-VTT frames and Panda key frames.

python tests/bench/bench_retrieval_quality.py --assets ../shared/assets [--work /tmp/quality]

Crawls both corpora, embeds them with the mini-CLIP of the assets, joins by each retriever under the
guard, and prints the mean cosine of the caption's and the retrieved picture's CLIP vectors beside that
of random pictures. The judge is the CLIP that `clip` and `hybrid` search with: it flatters them.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from infra.certificate import read_certificate
from infra.cluster import RayConfig, ray_session
from pipeline.clips import crawl
from pipeline.memory import build_index, open_memory
from pipeline.memory.vectors import cosines, vectors_numpy
from pipeline.prompts import augment
from pipeline.shards import ShardSet
from tests.infra.tiny_clips import mini_clip

PANDA_SOURCE = r"([\w-]{11})\.\d+\.mp4$"


def prepare(assets: Path, work: Path) -> Path:
    """Clips and memory, made once."""
    sources = {
        "panda": {"path": f"{assets}/panda/captions.jsonl", "columns": {"uri": "clip"}},
        "msrvtt": {
            "path": f"{assets}/msrvtt/train.parquet",
            "columns": {"uri": "image"},
            "media": "image",
        },
    }
    for name, source in sources.items():
        crawl.run(
            crawl.CrawlConfig.model_validate(
                {"sources": [{"kind": "manifest", "name": name, **source}], "out": str(work / name)}
            )
        )
    memory = work / "memory"
    clips = tuple(str(work / name) for name in sources)
    clip = mini_clip(assets / "weights", work, context_length=64)
    build_index.run(build_index.BuildIndexConfig(clips=clips, out=str(memory), clip=clip))
    return memory


def similarities(out: Path) -> tuple[list[float], list[float]]:
    """Of the best document, and of all that are stored."""
    first, every = [], []
    shards = ShardSet(str(out))
    for number in range(len(shards)):
        for row in shards.read_row_group(number, ["segments"]).to_pylist():
            found = [s["document"] for s in row["segments"] if s["type"] == "image"]
            every += [document["clip_similarity"] for document in found]
            first += [document["clip_similarity"] for document in found[:1]]
    return first, every


def at_random(memory: Path, captions: int) -> np.ndarray:
    sample = open_memory(str(memory)).sample
    text, image = (vectors_numpy(sample[f"{n}_embedding"].combine_chunks()) for n in ("text", "image"))
    draw = np.random.default_rng(0)
    texts, pictures = draw.integers(0, len(sample), (2, captions * 20))
    different = texts != pictures
    return cosines(text[texts[different]], image[pictures[different]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/vimi-quality"))
    options = parser.parse_args()
    assets, work = options.assets.resolve(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    lines = []
    with ray_session(RayConfig()):
        memory = prepare(assets, work)
        for name in ("bm25", "clip", "hybrid"):
            out = work / f"prompts-{name}"
            values = {
                "clips": str(work / "panda"),
                "memory": str(memory),
                "out": str(out),
                "retrieve": {"retriever": name, "k": 5},
                "guard": {"source_pattern": PANDA_SOURCE},
                "target": {"kind": "reference"},
            }
            started_s = time.perf_counter()
            certificate = augment.run(augment.AugmentConfig.model_validate(values))
            first, every = similarities(out)
            lines.append((name, np.mean(first), np.mean(every), len(every), certificate.facts["refused"]))
            print(f"{name}: {time.perf_counter() - started_s:.1f} s")
    rows = read_certificate(memory)
    assert rows is not None
    random = at_random(memory, 100)
    print(f"{len(first)} captions, {rows.num_out} documents, mean cosine of caption and picture")
    print(f"{'retriever':10} {'first':>8} {'top 5':>8} {'pictures':>9}  refused by the guard")
    for name, best, mean, count, refused in lines:
        print(f"{name:10} {best:8.3f} {mean:8.3f} {count:9}  {refused}")
    print(f"{'random':10} {random.mean():8.3f} {random.mean():8.3f} {len(random):9}")


if __name__ == "__main__":
    main()
