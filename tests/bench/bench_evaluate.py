"""FVD features of videos on the CPU: decoding, I3D, cache, and the distance. Prints a table.

python tests/bench/bench_evaluate.py [videos]        default 16; 256 for the whole
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model.evaluate.extract import Extractor, FeatureCache
from model.evaluate.metric import Video
from model.evaluate.metrics import METRICS
from model.evaluate.networks import NetworkConfig
from model.evaluate.scores import folds_of, score
from model.sampling.film import encode_mp4
from pipeline.evaluate.decode import leading_frames

SIZE = (16, 224, 224, 3)


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def main(count: int) -> None:
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    rows: list[tuple[str, float, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = draw.integers(0, 256, (8, 1, 28, 28, 3), np.uint8).repeat(8, 2).repeat(8, 3)
        videos = [
            np.ascontiguousarray(np.roll(base[n % 8].repeat(16, 0), 3 * n, 2)) for n in range(min(count, 8))
        ]
        files = [Path(folder) / f"{n}.mp4" for n in range(len(videos))]
        for file, video in zip(files, videos, strict=True):
            file.write_bytes(encode_mp4(video, 24))
        seconds = timed(lambda: [leading_frames(str(file), 16) for file in files])
        rows.append(("decode", seconds / len(files), "s a video of 16 x 224 x 224"))
        extractor = Extractor(NetworkConfig(), ["i3d"], FeatureCache(folder), {}, torch.device("cpu"))
        seconds = timed(lambda: extractor.video_keys("first"))
        rows.append(("load I3D", seconds, "s"))
        extractor.video(extractor.video_keys("warm"), ["i3d"], videos[0])
        numbers = range(count)
        seconds = timed(
            lambda: [
                extractor.video(extractor.video_keys(str(n)), ["i3d"], np.roll(videos[n % len(videos)], n, 1))
                for n in numbers
            ]
        )
        rows.append(("I3D, one thread", seconds / count, "s a video"))
        rows.append(("256 videos on 2 cores", seconds / count * 128, "s"))
        seconds = timed(lambda: [extractor.cache.require(extractor.video_keys(str(n))["i3d"]) for n in numbers])
        rows.append(("from the cache", seconds / count * 1e3, "ms a video"))
        features = draw.normal(size=(4096, 400)).astype(np.float32)
        folds = folds_of([f"{n:05d}" for n in range(2048)])
        given = [
            (Video(str(n), {"i3d": features[n]}, is_real=n < 2048, fold=folds[n % 2048]), {})
            for n in range(4096)
        ]
        for name in ("fvd", "kvd"):
            seconds = timed(lambda name=name: score({name: METRICS[name]}, given))
            rows.append((f"{name} of 2,048 and 2,048 with its interval", seconds, "s"))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(("peak memory", peak_mb, "MiB"))
    for name, value, unit in rows:
        print(f"{name:44} {value:10.3f} {unit}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
