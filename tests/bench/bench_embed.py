"""Embedding end to end (read, decode, preprocess, embed, stage) beside the bare model and a plain loop.

    python tests/bench/bench_embed.py CLIPS [--rows 512] [--clip offline | CONFIG.json WEIGHTS.pt] [--stages]

CLIPS is a folder of `vimi-data crawl`; all read the same files from disk with the same weights, each in a
process of its own:

    ours            the job's worker, from the clips table to the staged Arrow file
    bare model      both towers on the same pixels and texts, which lie ready in memory
    bare, kept      the same after `settle_process`'s memory setting: the strictest comparison
    plain loop      what clip-retrieval's inference does: a DataLoader of single pictures with open_clip's
                    own transform, float32, padded texts, then one npy and one Parquet file
    ray stages      Ray Data: decoding tasks, then an actor with the model (with --stages, beside our job)
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from infra.clip import ClipConfig, load_clip
from infra.clip.preprocess import Preprocessing
from infra.storage import require_certificate
from pipeline.embed import EmbedConfig, Embedder, clip_units, read_picture, read_slice
from pipeline.embed.streams import settle_process

WARM = 32
Timed = dict[str, float]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(payload: dict[str, Any], config: ClipConfig, embed: EmbedConfig) -> Timed:
    with tempfile.TemporaryDirectory() as folder:
        worker = Embedder(clip=config, embed=embed, staged=folder, threads=os.cpu_count() or 2)()
        worker({**payload, "rows": WARM})
        started_s = time.perf_counter()
        receipt = worker(payload)
        return {"s": time.perf_counter() - started_s, "n": receipt["documents"], "mb": peak_mb()}


def bare(payload: dict[str, Any], config: ClipConfig, embed: EmbedConfig, kept: bool) -> Timed:
    import torch

    threads = torch.get_num_threads()
    if kept:
        settle_process("cpu")
        torch.set_num_threads(threads)
    clip, rows = load_clip(config), rows_of(payload)
    pixels = np.concatenate([read_picture(row, embed, clip.preprocessing).pixels for row in rows])
    texts = [row["caption"].strip() for row in rows]
    clip.encode_pixels(pixels[:WARM])
    clip.encode_texts(texts[:WARM])
    started_s = time.perf_counter()
    clip.encode_pixels(pixels)
    clip.encode_texts(texts)
    return {"s": time.perf_counter() - started_s, "n": len(rows), "mb": peak_mb()}


def plain_loop(payload: dict[str, Any], config: ClipConfig, embed: EmbedConfig) -> Timed:
    import pandas
    import torch

    clip = load_clip(config.model_copy(update={"precision": "fp32"}))
    rows = rows_of(payload)
    transform = open_clip_transform(clip.preprocessing)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        clip.model.encode_image(transform(picture(rows[0])).unsqueeze(0))
        started_s = time.perf_counter()
        files: Any = Files(rows, transform)
        loader = torch.utils.data.DataLoader(files, 64, num_workers=os.cpu_count() or 2)
        images, texts = [], []
        for pixels, captions in loader:
            ids, _ = clip.tokenize(captions)
            images.append(torch.nn.functional.normalize(clip.model.encode_image(pixels), dim=-1).numpy())
            texts.append(torch.nn.functional.normalize(clip.model.encode_text(ids), dim=-1).numpy())
        np.save(f"{folder}/images.npy", np.concatenate(images).astype(np.float16))
        np.save(f"{folder}/texts.npy", np.concatenate(texts).astype(np.float16))
        pandas.DataFrame({"caption": [row["caption"] for row in rows]}).to_parquet(f"{folder}/meta.parquet")
        return {"s": time.perf_counter() - started_s, "n": len(rows), "mb": peak_mb()}


class Files:
    """clip-retrieval's FilesDataset: one picture from disk, transformed, with its caption."""

    def __init__(self, rows: list[dict[str, Any]], transform: Callable[[Any], Any]) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        return self.transform(picture(self.rows[index])), self.rows[index]["caption"]


def picture(row: dict[str, Any]) -> Any:
    from PIL import Image

    return Image.open(row["local_uri"])


def open_clip_transform(preprocessing: Preprocessing) -> Callable[[Any], Any]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    values = preprocessing.model_dump()
    transform: Any = image_transform_v2(PreprocessCfg(**{**values, "size": values["size"][0]}), is_train=False)
    return transform


def job(payload: dict[str, Any], config: ClipConfig, embed: EmbedConfig) -> Timed:
    """The job as it runs in Ray: units, receipts, staged files; model loading taken off."""
    from infra.cluster import RayConfig, ray_session
    from pipeline.job import Unit, run_units

    cpus = os.cpu_count() or 2
    starts = range(0, payload["rows"], 256)
    units = [
        Unit(f"u{i}", {**payload, "start": i, "rows": min(256, payload["rows"] - i)})
        for i in [0, *[s + 1 for s in starts]]
    ]
    with ray_session(RayConfig()), tempfile.TemporaryDirectory() as folder:
        worker = Embedder(clip=config, embed=embed, staged=folder, threads=cpus)
        options = {"what": "embed", "num_workers": 1, "num_cpus": cpus}
        run_units(folder, units[:1], worker, **options)  # loads the model, once more below
        started_s = time.perf_counter()
        run_units(folder, units[:1], worker, **options)
        idle_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        run_units(folder, units, worker, **options)
        return {"s": time.perf_counter() - started_s - idle_s, "n": payload["rows"], "mb": 0.0}


def ray_stages(payload: dict[str, Any], config: ClipConfig, embed: EmbedConfig) -> Timed:
    """A CPU stage of its own before the actor that holds the model."""
    import ray.data

    from infra.cluster import RayConfig, quiet_ray_data, ray_session

    preprocessing = load_clip(config).preprocessing
    rows = rows_of(payload)

    def decode(batch: Any) -> Any:
        found = [read_picture(rows[n], embed, preprocessing) for n in batch["id"]]
        return {"id": batch["id"], "pixels": np.stack([p.pixels[0] for p in found])}

    class Model:
        def __init__(self) -> None:
            self.clip = load_clip(config)

        def __call__(self, batch: Any) -> Any:
            texts = self.clip.encode_texts([rows[n]["caption"].strip() for n in batch["id"]])
            return {"image": self.clip.encode_pixels(batch["pixels"]), "text": texts}

    with ray_session(RayConfig(object_store_bytes=2_000_000_000)):
        quiet_ray_data()

        def once(count: int) -> float:
            started_s = time.perf_counter()
            stage = ray.data.range(count, override_num_blocks=max(1, count // 64)).map_batches(
                decode, batch_size=64, num_cpus=0.5
            )
            compute = ray.data.ActorPoolStrategy(size=1)
            for _ in stage.map_batches(Model, batch_size=64, compute=compute, num_cpus=1).iter_batches():
                pass
            return time.perf_counter() - started_s

        once(WARM)
        idle_s = once(WARM)
        return {"s": once(payload["rows"]) - idle_s, "n": payload["rows"] - WARM, "mb": 0.0}


def rows_of(payload: dict[str, Any]) -> list[dict[str, Any]]:
    columns = ["media", "local_uri", "source_uri", "start_s", "end_s", "caption", "phash"]
    return read_slice(payload["uri"], payload["start"], payload["rows"], columns).to_pylist()


def apart(function: Callable[..., Timed], *arguments: Any) -> Timed:
    """In a process of its own: nobody inherits another's memory or threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--clip", nargs="+", default=["offline"])
    parser.add_argument("--key-frames", type=int, default=1)
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--no-loop", action="store_true", help="videos: the plain loop reads pictures only")
    options = parser.parse_args()
    config = ClipConfig(**dict(zip(("name", "pretrained"), options.clip, strict=False)))
    embed = EmbedConfig(key_frames=options.key_frames)
    certificate = require_certificate(options.clips, job="crawl", made_by="vimi-data crawl")
    unit = next(clip_units([(options.clips, certificate)], rows_per_unit=options.rows, key="bench"))
    arguments = (unit.payload, config, embed)
    rows = {"ours": apart(ours, *arguments), "bare model": apart(bare, *arguments, False)}
    rows["bare, kept"] = apart(bare, *arguments, True)
    if not options.no_loop:
        rows["plain loop"] = apart(plain_loop, *arguments)
    if options.stages:
        rows |= {"our job in Ray": job(*arguments), "ray stages": ray_stages(*arguments)}
    print(f"CLIP {' '.join(options.clip)}, {options.key_frames} key frames, {os.cpu_count()} CPUs")
    for name, found in rows.items():
        rate = found["n"] / found["s"]
        ratio = rows["ours"]["n"] / rows["ours"]["s"] / rate
        print(f"  {name:<15} {found['s']:7.2f} s {rate:8.1f} documents/s  ours / this {ratio:5.2f}"
              f"  peak {found['mb']:6,.0f} MB")  # fmt: skip
    print("  goals: ours / bare at least 0.85, ours / plain loop at least 1.3")


if __name__ == "__main__":
    main()
