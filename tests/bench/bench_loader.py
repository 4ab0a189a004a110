"""How fast prompt shards are read: our loader against raw pyarrow, WebDataset's tar layout and Ray Data.

    python tests/bench/bench_loader.py [--rows 2000]

Rows are about 250 KB (raw frames). Every reader yields the same bytes as uint8 tensors in batches of 8, from
the page cache: ours in its shuffled order and prompts with them, the others in file order and nothing else.
Runs are interleaved and the medians of three are shown. The tar reader is WebDataset where that package is
installed, else Python's own tarfile (which WebDataset reads with, too). The last lines time a step's wait for
data, and a resume.
"""

import argparse
import importlib.util
import io
import itertools
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow.fs import LocalFileSystem

from infra.certificate import Certificate, FileEntry, file_entries, write_certificate
from model.data.buckets import Bucket
from model.data.loader import Loader, RowGroups
from model.data.plan import Plan
from model.data.shards import index_shards, open_shards
from model.training.driver import KEEP_MEMORY
from model.training.preflight import read_index, write_index
from pipeline.schema import PROMPTS
from pipeline.shards import write_meta, write_shard

SHAPE = (16, 72, 72, 3)
BATCH = 8
CACHE = 256 << 20
"""Room for the row groups that 8 lanes walk side by side; the rest is read anew, as in a long run."""
OURS = "ours (shuffled, prompts decoded)"


def make_shards(folder: Path, rows: int, group_rows: int = 32, file_rows: int = 512) -> None:
    """Prompt shards of random frames, and the same rows as tar files."""
    rng = np.random.default_rng(0)
    files = []
    for number, first in enumerate(range(0, rows, file_rows)):
        count = min(file_rows, rows - first)
        table = [row(first + n, rng.integers(0, 256, SHAPE, dtype=np.uint8)) for n in range(count)]
        name = f"part-{number:05d}.parquet"
        files.append(write_shard(str(folder / name), table, PROMPTS, row_group_rows=group_rows))
        with tarfile.open(folder / f"part-{number:05d}.tar", "w") as tar:
            for item in table:
                info = tarfile.TarInfo(item["prompt_id"] + ".bin")
                info.size = len(item["target"]["data"])
                tar.addfile(info, io.BytesIO(item["target"]["data"]))
    files.append(write_meta(str(folder), files, row_group_rows=group_rows))
    certificate = Certificate(job="augment", config_hash="", num_in=rows, num_out=rows, files=files)
    write_certificate(str(folder), certificate)


def row(number: int, frames: np.ndarray) -> dict[str, Any]:
    t, h, w, _ = SHAPE
    return {
        "prompt_id": f"{number:024x}",
        "task": "pretrain",
        "clip_id": f"{number:024x}",
        "media": "video",
        "caption": "noise",
        "segments": [{"type": "text", "role": "caption", "text": "noise"}],
        "target": {
            "kind": "frames", "data": frames.tobytes(), "num_frames": t, "height_px": h, "width_px": w,
            "fps": 8.0,
        },
        "height_px": h,
        "width_px": w,
    }  # fmt: skip


BUCKETS = (Bucket("video", SHAPE[0], SHAPE[1], SHAPE[2]),)


def make_index(folder: Path, rows: int) -> None:
    """What a run does once, before it trains."""
    started_s = time.perf_counter()
    write_index(str(folder), index_shards(open_shards(str(folder)), BUCKETS))
    print(f"the index of a run, made once: {rows / (time.perf_counter() - started_s):,.0f} rows/s")


def open_loader(folder: Path, threads: int) -> Loader:
    shards = open_shards(str(folder))
    plan = Plan(read_index(str(folder)), len(shards.groups), seed=0, micro_batch=BATCH, lanes=8)
    groups = RowGroups(shards, BUCKETS, cache_bytes=CACHE)
    return Loader(plan, groups, select=lambda p, _: p, num_threads=threads)


def ours(folder: Path, rows: int, threads: int = 2) -> int:
    loader = open_loader(folder, threads)
    seen = sum(len(b.video) for b in itertools.islice(loader, rows // BATCH))
    loader.close()
    return seen


def raw_pyarrow(folder: Path, rows: int) -> int:
    """Row groups in file order, the target column alone: no shuffle, no prompts."""
    seen, waiting = 0, []
    for file in sorted(folder.glob("part-*.parquet")):
        shards = pq.ParquetFile(file)
        for group in range(shards.num_row_groups):
            table = shards.read_row_group(group, columns=["prompt_id", "target"])
            for target in table["target"].combine_chunks().field("data"):
                waiting.append(torch.from_numpy(np.frombuffer(target.as_buffer(), np.uint8).reshape(SHAPE)))
                if len(waiting) == BATCH:
                    seen += len(torch.stack(waiting))
                    waiting.clear()
    return seen


def tar_reader(folder: Path, rows: int) -> int:
    seen, waiting = 0, []
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None
                waiting.append(torch.frombuffer(bytearray(data.read()), dtype=torch.uint8).view(SHAPE))
                if len(waiting) == BATCH:
                    seen += len(torch.stack(waiting))
                    waiting.clear()
    return seen


def web_dataset(folder: Path, rows: int) -> int:
    import webdataset  # pyright: ignore[reportMissingImports]

    def decode(item: dict[str, Any]) -> torch.Tensor:
        return torch.frombuffer(bytearray(item["bin"]), dtype=torch.uint8).view(SHAPE)

    files = [str(file) for file in sorted(folder.glob("*.tar"))]
    found = webdataset.WebDataset(files, shardshuffle=False).map(decode).batched(BATCH, torch.stack)
    return sum(len(batch) for batch in found)


def ray_data(folder: Path, rows: int) -> int:
    import ray.data

    def decode(batch: Any) -> Any:
        frames = [np.frombuffer(t["data"], np.uint8).reshape(SHAPE) for t in batch["target"]]
        return {"video": np.stack(frames)}

    files = [str(f) for f in sorted(folder.glob("part-*.parquet"))]
    found = ray.data.read_parquet(files, filesystem=LocalFileSystem(), columns=["target"])
    found = found.map_batches(decode, batch_size=BATCH)
    return sum(len(batch["video"]) for batch in found.iter_torch_batches(batch_size=BATCH))


def measure(readers: dict[str, Callable[[Path, int], int]], folder: Path, rows: int, runs: int) -> None:
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(runs):
        for name, read in readers.items():
            started_s = time.perf_counter()
            seen = read(folder, rows)
            rates[name].append(seen / (time.perf_counter() - started_s))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'reader':34} {'rows/s':>10} {'ours / it':>10}")
    for name, rate in medians.items():
        print(f"{name:34} {rate:10,.0f} {medians[OURS] / rate:10.2f}")


def measure_wait(folder: Path, step_s: float = 0.05, steps: int = 60) -> None:
    """Share of the time that a step of 50 ms, all of it work on one core, waits for its batch."""
    loader = open_loader(folder, threads=2)
    batches = iter(loader)
    a = torch.randn(256, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    next(batches)
    waited_s, worked_s = 0.0, 0.0
    for _ in range(steps):
        started_s = time.perf_counter()
        next(batches)
        got_s = time.perf_counter()
        while time.perf_counter() - got_s < step_s:
            torch.mm(a, a)
        waited_s, worked_s = waited_s + got_s - started_s, worked_s + time.perf_counter() - got_s
    loader.close()
    torch.set_num_threads(threads)
    print(f"steps of {step_s * 1e3:.0f} ms, batches of {BATCH}: {waited_s / worked_s:.2%} of it waits for data")


def measure_seek(folder: Path, rows: int = 10_000_000, group_rows: int = 50) -> None:
    """What a resume does before its first row, at position 10^9: manifest of `rows` rows, run's index, plan.

    Manifest and index are simulated: their files are whole, only the first shard exists.
    """
    count = rows // group_rows
    place = folder / "many"
    place.mkdir()
    (place / "part-00000.parquet").symlink_to(folder / "part-00000.parquet")
    numbers = np.arange(count)
    files = [
        FileEntry(path=f"part-{n:05d}.parquet", rows=100 * group_rows, num_bytes=0, sha256="")
        for n in range(count // 100)
    ]
    meta = write_meta(str(place), files, row_group_rows=group_rows)
    there = file_entries(str(place), [str(place / "part-00000.parquet")])[0]
    certificate = Certificate(job="augment", config_hash="", num_in=rows, num_out=rows, files=[there, meta])
    write_certificate(str(place), certificate)
    index = {
        "group": numbers,
        "bucket": np.zeros(count, np.int32),
        "task": ["pretrain"] * count,
        "rows": np.full(count, group_rows),
    }
    write_index(str(place), pa.table(index))

    started_s = time.perf_counter()
    shards = open_shards(str(place))
    plan = Plan(read_index(str(place)), len(shards.groups), seed=0, micro_batch=BATCH)
    plan.source(10**9)
    first_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    for position in range(10**9, 10**9 + 10_000):
        plan.source(position)
    each_us = (time.perf_counter() - started_s) * 1e2
    print(f"resume at sample 10^9 of {rows:.0e} rows: {first_s * 1e3:.0f} ms, then {each_us:.0f} us a sample")


def main() -> None:
    if not KEEP_MEMORY.items() <= os.environ.items():  # as in training; read once, when Arrow is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    readers: dict[str, Callable[[Path, int], int]] = {
        OURS: ours,
        "pyarrow, file order, target only": raw_pyarrow,
        "tar, file order": tar_reader,
    }
    if importlib.util.find_spec("webdataset"):
        readers["WebDataset, file order"] = web_dataset
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), options.rows)
        make_index(Path(folder), options.rows)
        measure(readers, Path(folder), options.rows, options.runs)
        measure_wait(Path(folder))
        from infra.cluster import RayConfig, ray_session

        with ray_session(RayConfig()):
            measure(
                {**{k: readers[k] for k in list(readers)[:1]}, "Ray Data": ray_data},
                Path(folder),
                options.rows,
                1,
            )
        measure_seek(Path(folder))


if __name__ == "__main__":
    main()
