"""Embedding end to end (read, decode, preprocess, embed, stage) beside the bare model and a plain loop.

    python tests/bench/bench_embed.py CLIPS [--rows 128] [--rounds 4] [--job]
                                      [--clip offline | CONFIG.json WEIGHTS.pt | ViT-B-32 WEIGHTS.pt]

CLIPS is a folder of `vimi-data crawl` with pictures. All sides take the same files and weights, each in a
process of its own that lives through all rounds; they take turns, slice by slice, so that a busy machine
slows all of them alike:

    ours          the job's worker, from the clips table to the staged Arrow file
    bare model    both towers, all cores, on the same pixels and texts, which lie ready in memory
    bare, kept    the same after `settle_process`'s memory setting: the strictest comparison
    plain loop    what clip-retrieval's inference does: a DataLoader of single pictures with open_clip's own
                  transform, float32, padded texts, then one npy and one Parquet file

A ratio is the median of the rounds'. `decode` is what read, decode and resize take of one core, beside what
both towers take of it: their share is the least that ours can lose to the bare model where both want the
same cores. --job adds the whole command in Ray: its start and the loading of the model, and its steady rate.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from infra.certificate import require_certificate
from infra.clip import Clip, ClipConfig, load_clip
from infra.clip.preprocess import Preprocessing
from pipeline.memory.embed.pictures import read_picture
from pipeline.memory.embed.streams import settle_process
from pipeline.memory.embed.worker import Embedder, clip_units
from pipeline.shards import read_slice

COLUMNS = ["media", "local_uri", "source_uri", "start_s", "end_s", "caption", "phash"]
Payload = dict[str, Any]
Round = Callable[[Any], Any]
Made = tuple[Round, Callable[[Payload], Any]]


def ours(config: ClipConfig) -> Made:
    folder = tempfile.mkdtemp()
    worker = Embedder(clip=config, staged=folder, threads=os.cpu_count() or 2)()
    return worker, lambda payload: payload


def bare(config: ClipConfig) -> Made:
    clip = load_clip(config)

    def ready(payload: Payload) -> Any:
        rows = rows_of(payload)
        pixels = np.concatenate([read_picture(row, clip.preprocessing).pixels for row in rows])
        return pixels, [row["caption"].strip() for row in rows]

    def once(given: Any) -> None:
        clip.encode_pixels(given[0])
        clip.encode_texts(given[1])

    return once, ready


def bare_kept(config: ClipConfig) -> Made:
    import torch

    threads = torch.get_num_threads()
    settle_process("cpu")
    torch.set_num_threads(threads)
    return bare(config)


def plain_loop(config: ClipConfig) -> Made:
    import pandas
    import torch

    clip = load_clip(config.model_copy(update={"precision": "fp32"}))
    transform, folder = open_clip_transform(clip.preprocessing), tempfile.mkdtemp()

    def once(rows: Any) -> None:
        files: Any = Files(rows, transform)
        images, texts = [], []
        with torch.inference_mode():
            for pixels, captions in torch.utils.data.DataLoader(files, 64, num_workers=os.cpu_count() or 2):
                ids, _ = clip.tokenize(captions)
                images.append(torch.nn.functional.normalize(clip.model.encode_image(pixels), dim=-1).numpy())
                texts.append(torch.nn.functional.normalize(clip.model.encode_text(ids), dim=-1).numpy())
        np.save(f"{folder}/images.npy", np.concatenate(images).astype(np.float16))
        np.save(f"{folder}/texts.npy", np.concatenate(texts).astype(np.float16))
        pandas.DataFrame({"caption": [row["caption"] for row in rows]}).to_parquet(f"{folder}/meta.parquet")

    return once, rows_of


class Files:
    """clip-retrieval's FilesDataset: one picture from disk, transformed, with its caption."""

    def __init__(self, rows: list[dict[str, Any]], transform: Callable[[Any], Any]) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        from PIL import Image

        return self.transform(Image.open(self.rows[index]["local_uri"])), self.rows[index]["caption"]


def open_clip_transform(preprocessing: Preprocessing) -> Callable[[Any], Any]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    values = preprocessing.model_dump()
    transform: Any = image_transform_v2(PreprocessCfg(**{**values, "size": values["size"][0]}), is_train=False)
    return transform


def rows_of(payload: Payload) -> list[dict[str, Any]]:
    return read_slice(payload["uri"], payload["start"], payload["rows"], COLUMNS).to_pylist()


MADE: list[Made] = []


def start(make: Callable[[ClipConfig], Made], config: ClipConfig, payload: Payload) -> None:
    MADE.append(make(config))
    run, ready = MADE[0]
    run(ready({**payload, "rows": 32}))


def turn(payload: Payload) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds with those of children, peak MB) of one round, in the side's process."""
    run, ready = MADE[0]
    given = ready(payload)
    cpu_s, started_s = used_s(), time.perf_counter()
    run(given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return time.perf_counter() - started_s, used_s() - cpu_s, peak


def used_s() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def shares(config: ClipConfig, payload: Payload) -> dict[str, float]:
    """Milliseconds of one core for each document, by step; a side of its own, one thread."""
    from PIL import Image

    settle_process("cpu")
    clip: Clip = load_clip(config.model_copy(update={"batch_size": 16}))
    rows = rows_of(payload)
    texts = [row["caption"].strip() for row in rows]
    pictures = [read_picture(row, clip.preprocessing) for row in rows]
    pixels = np.concatenate([picture.pixels for picture in pictures])
    decoded = [Image.open(io.BytesIO(picture.jpeg)).convert("RGB") for picture in pictures]
    steps: dict[str, Callable[[], Any]] = {
        "read, decode and resize": lambda: [read_picture(row, clip.preprocessing) for row in rows],
        "  of it open_clip's resize": lambda: clip.preprocess(decoded),
        "image tower": lambda: clip.encode_pixels(pixels),
        "text tower": lambda: clip.encode_texts(texts),
    }
    found = {}
    for name, step in steps.items():
        step()
        before_s = time.process_time()
        step()
        found[name] = (time.process_time() - before_s) / len(rows) * 1000
    return found


def whole_job(config: ClipConfig, payload: Payload, rounds: int) -> None:
    """The job as it runs in Ray: the first unit with Ray's start and the model, then the rest."""
    from infra.cluster import RayConfig, ray_session
    from pipeline.job import run_units
    from pipeline.journal import Unit

    cpus, size = os.cpu_count() or 2, payload["rows"]
    units = [Unit(f"u{n}", {**payload, "start": n * size}) for n in range(rounds)]
    started_s = time.perf_counter()
    with ray_session(RayConfig()), tempfile.TemporaryDirectory() as folder:
        worker = Embedder(clip=config, staged=folder, threads=cpus)
        options: dict[str, Any] = {"what": "embed", "num_workers": 1, "num_cpus": cpus}
        run_units(folder, units[:1], worker, **options)
        first_s = time.perf_counter() - started_s
        run_units(folder, units, worker, **options)
        rest_s = time.perf_counter() - started_s - first_s
    steady = (rounds - 1) * size / rest_s
    print(
        f"  our job in Ray: {first_s:.1f} s for Ray, the model and {size} documents; then {steady:.1f} a second"
    )


def write_profile(place: Path, name: str, cpu_s: float, rows: int) -> None:
    """The embedding rate of one CLIP in the profile of `vimi-data plan`."""
    profile = json.loads(place.read_text()) if place.exists() else {}
    what = f"bench_embed.py, {rows} pictures with captions, from file to staged document"
    rate = {"cpu_s_per_document": round(cpu_s, 4), "what": what}
    profile["embed"] = {**profile.get("embed", {}), name: rate}
    place.write_text(json.dumps(profile, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips")
    parser.add_argument("--rows", type=int, default=128, help="documents of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clip", nargs="+", default=["offline"])
    parser.add_argument("--job", action="store_true")
    parser.add_argument("--profile", help="add the CPU time to this file, for `vimi-data plan`")
    options = parser.parse_args()
    config = ClipConfig(**dict(zip(("name", "pretrained"), options.clip, strict=False)))
    certificate = require_certificate(options.clips, job="crawl", made_by="vimi-data crawl")
    payload = next(clip_units([(options.clips, certificate)], rows_per_unit=options.rows, key="bench")).payload
    sides = {"ours": ours, "bare model": bare, "bare, kept": bare_kept, "plain loop": plain_loop}
    context = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, context) for name in sides}
    for name, make in sides.items():
        pools[name].submit(start, make, config, payload).result()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    for number in range(options.rounds):
        slice_ = {**payload, "start": number * options.rows}
        for name in sides:
            found[name].append(pools[name].submit(turn, slice_).result())
    for pool in pools.values():
        pool.shutdown()
    print(f"CLIP {' '.join(options.clip)}, {options.rounds} rounds of {options.rows}, {os.cpu_count()} CPUs")
    for name, rounds in found.items():
        ratio = statistics.median(one[0] / own[0] for own, one in zip(found["ours"], rounds, strict=True))
        cpu = statistics.median(one[1] / own[1] for own, one in zip(found["ours"], rounds, strict=True))
        best = options.rows / min(wall_s for wall_s, _, _ in rounds)
        print(f"  {name:<11} {best:6.1f} documents/s at best; ours / this {ratio:5.2f} by the clock,", end=" ")
        print(f"{cpu:5.2f} by CPU time; peak {rounds[-1][2]:6,.0f} MB")
    print("  goals: ours / bare at least 0.85, ours / plain loop at least 1.3")
    with ProcessPoolExecutor(1, context) as pool:
        for name, value in pool.submit(shares, config, payload).result().items():
            print(f"    {name:<27} {value:6.2f} ms of a core for each document")
    if options.profile:
        cpu_s = statistics.median(cpu_s for _, cpu_s, _ in found["ours"]) / options.rows
        write_profile(Path(options.profile), config.name, cpu_s, options.rows * options.rounds)
    if options.job:
        whole_job(config, payload, options.rounds)


if __name__ == "__main__":
    main()
