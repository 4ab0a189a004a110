"""Embedding end to end (read, decode, preprocess, embed, stage) beside the bare model and a plain loop.

    python tests/bench/bench_embed.py CLIPS [--rows 256] [--clip offline]

CLIPS is a folder of `vimi-data crawl`. The plain loop is what clip-retrieval's inference does: a
DataLoader of single pictures with open_clip's own transform, float32, padded texts.
"""

import argparse
import io
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from infra.clip import ClipConfig, load_clip
from infra.storage import join, require_certificate
from pipeline.embed import EmbedConfig, Embedder, clip_units, read_slice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--clip", default="offline")
    parser.add_argument("--key-frames", type=int, default=1)
    options = parser.parse_args()
    certificate = require_certificate(options.clips, job="crawl", made_by="vimi-data crawl")
    config, embed = ClipConfig(name=options.clip), EmbedConfig(key_frames=options.key_frames)
    clip = load_clip(config)
    unit = next(clip_units([(options.clips, certificate)], rows_per_unit=options.rows, key="bench"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        worker = Embedder(clip=config, embed=embed, staged=folder)
        worker.run({**unit.payload, "rows": min(16, unit.payload["rows"])}, clip, pool)  # warm up
        started_s = time.perf_counter()
        receipt = worker.run(unit.payload, clip, pool)
        whole_s = time.perf_counter() - started_s
        documents = pa.ipc.open_file(join(folder, receipt["file"])).read_all()
    count, texts = len(documents), documents["text"].to_pylist()
    pictures = documents["image"].to_pylist()
    bare_s = bare(clip, count * options.key_frames, texts)
    loop_s = plain_loop(options.clip, pictures, texts)
    rows = read_slice(unit.payload["uri"], 0, 1, ["media"])["media"][0].as_py()
    print(f"{count} documents ({rows}), {options.key_frames} key frames, CLIP {options.clip}")
    for name, seconds in (("ours, end to end", whole_s), ("bare model", bare_s), ("plain loop", loop_s)):
        print(f"  {name:<18} {seconds:7.2f} s  {count / seconds:7.1f} documents/s")
    print(f"  ours / bare model {bare_s / whole_s:.2f}, goal 0.85")
    print(f"  ours / plain loop {loop_s / whole_s:.2f}, goal 1.3")
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


def bare(clip, count: int, texts: list[str]) -> float:
    """Seconds of the two towers alone, on pixels that lie ready."""
    pixels = np.zeros((count, *clip.preprocessing.size, 3), np.uint8)
    started_s = time.perf_counter()
    clip.encode_pixels(pixels)
    clip.encode_texts(texts)
    return time.perf_counter() - started_s


def plain_loop(name: str, pictures: list[bytes], texts: list[str]) -> float:
    """Seconds of decode, transform and float32 forward in batches of 64, one after the other."""
    import torch
    from PIL import Image

    clip = load_clip(ClipConfig(name=name, precision="fp32"))
    started_s = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(pictures), 64):
            some = [Image.open(io.BytesIO(p)).convert("RGB") for p in pictures[start : start + 64]]
            pixels = clip.preprocessing.normalise(clip.preprocess(some), clip.device)
            clip.model.encode_image(pixels.contiguous())
            ids, _ = clip.tokenize(texts[start : start + 64])
            clip.model.encode_text(ids)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
