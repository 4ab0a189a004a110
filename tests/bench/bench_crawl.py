"""Pictures by address from a loopback server, clips by range, and memory against the number of rows.

    python tests/bench/bench_crawl.py [--images 1500] [--rows 1000 10000 100000]

img2dataset is measured on the same server if it is installed (it resizes; `disabled` resizing is used).
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
from bench_decode import encode, film, repeat_packets
from PIL import Image

from infra.cluster import RayConfig
from pipeline.clips.crawl import CrawlConfig, Worker, run
from pipeline.clips.filters import FilterConfig
from pipeline.clips.parent import inspect_parent
from pipeline.clips.sources import Cut, Item, SourceConfig
from pipeline.media.frames import probe

SERVER = """
import sys, http.server, functools
class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=sys.argv[1]))
print(s.server_port, flush=True)
s.serve_forever()
"""


CLIP_S = 8.5
"""Mean length of Panda-70M's clips."""


def cpu_s() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def write_images(root: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 255, (30, 40, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=85)
        body = data.getvalue()
        (root / f"{number}.jpg").write_bytes(body if number % 50 else body[:500])  # 2 % are corrupt


def images(root: Path, count: int, peer: str | None) -> None:
    write_images(root, count)
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(root)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    urls = [f"http://127.0.0.1:{port}/{n}.jpg" for n in range(count)]
    urls += [f"http://127.0.0.1:{port}/absent-{n}.jpg" for n in range(count // 50)]
    print(f"{'pictures by address':<28}{'ok':>8}{'bad rows':>10}{'images/CPU-s':>14}{'images/s':>10}")
    try:
        ours(root, urls)
        if peer:
            img2dataset(root, urls, peer)
        else:
            print("img2dataset: not measured (--peer-python: an interpreter that has it)")
    finally:
        server.kill()
        server.wait()


def ours(root: Path, urls: list[str]) -> None:
    config = CrawlConfig.model_validate(
        {
            "sources": [SourceConfig(kind="urls", path="-")],
            "out": str(root / "out"),
            "fetch": {"allow_hosts": ["127.0.0.1"], "per_host_per_s": 1e6},
        }
    )
    worker = Worker(config)
    start, start_cpu = time.monotonic(), cpu_s()
    statuses: list[str] = []
    for first in range(0, len(urls), 32):
        items = [Item(url, "image", (Cut("a picture"),)).to_json() for url in urls[first : first + 32]]
        statuses += [row["status"] for row in worker({"items": items})["rows"]]
    wall_s = time.monotonic() - start
    worker.close()
    good = statuses.count("ok")
    rate = good / (cpu_s() - start_cpu)
    print(
        f"{'vimi crawl (one worker)':<28}{good:>8}{len(statuses) - good:>10}{rate:>14.0f}{good / wall_s:>10.0f}"
    )


def img2dataset(root: Path, urls: list[str], python: str) -> None:
    (root / "urls.txt").write_text("\n".join(urls))
    start, start_cpu = time.monotonic(), cpu_s()
    code = (
        "from img2dataset import download; download(url_list='urls.txt', output_folder='i2d', "
        "processes_count=1, thread_count=16, resize_mode='no', output_format='files', retries=0)"
    )
    subprocess.run([python, "-c", code], cwd=root, check=True, capture_output=True)
    good = len(list((root / "i2d").rglob("*.jpg")))
    rate, wall_s = good / (cpu_s() - start_cpu), time.monotonic() - start
    print(
        f"{'img2dataset (one process)':<28}{good:>8}{len(urls) - good:>10}{rate:>14.0f}{good / wall_s:>10.0f}"
    )


def clips(root: Path) -> None:
    """A clip as a range against a clip that is cut out exactly (decoded and encoded again)."""
    path = root / "film.mp4"
    encode(path, film(900), {"g": "30", "bf": "2"}, vfr=False)
    height, width = probe(path).height_px, probe(path).width_px
    cuts = tuple(Cut(f"clip {n}", n * CLIP_S, (n + 1) * CLIP_S) for n in range(4))
    item, found = Item(str(path), "video", cuts).to_json(), {"local_uri": str(path)}
    inspect_parent(item, found, "whole", FilterConfig())  # imports are not clipping
    start = time.process_time()
    rows = inspect_parent(item, found, "whole", FilterConfig())
    range_s = time.process_time() - start
    start = time.process_time()
    for cut in cuts:
        cut_exactly(path, root / "cut.mp4", cut)
    exact_s = time.process_time() - start
    good = sum(row["status"] == "ok" for row in rows)
    print(
        f"\n{good} clips of {CLIP_S:g} s, {width}x{height}: as ranges {range_s:.3f} CPU-s, cut exactly (x264's"
    )
    print(f"default preset, as video2dataset does) {exact_s:.2f} CPU-s: {exact_s / range_s:.0f}x")


def cut_exactly(source: Path, path: Path, cut: Cut) -> None:
    assert cut.start_s is not None and cut.end_s is not None
    with av.open(str(source)) as reader, av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = reader.streams.video[0].height, reader.streams.video[0].width
        stream.pix_fmt = "yuv420p"
        reader.seek(int(cut.start_s * 1_000_000))
        for frame in reader.decode(video=0):
            if frame.time >= cut.end_s:
                break
            if frame.time >= cut.start_s:
                frame.pts = None
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def memory(counts: list[int]) -> None:
    """Peak resident set of the driver and of the largest worker or decoder of a whole crawl."""
    print(f"\n{'rows':>10}{'driver MiB':>12}{'worker MiB':>12}{'decoder MiB':>13}{'rows/s':>9}")
    for count in counts:
        command = [sys.executable, __file__, "--one", str(count)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        driver, worker, decoder, wall_s = (float(word) for word in found.stdout.split()[-4:])
        print(f"{count:>10,}{driver:>12.0f}{worker:>12.0f}{decoder:>13.0f}{count / wall_s:>9.0f}")


def one(count: int) -> None:
    """A crawl of `count` rows, 50 clips a film; prints MiB of driver, worker, decoder, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        encode(root / "film.mp4", small_film(), {"g": "30"}, vfr=False)
        for number in range(count // 50):
            (root / f"{number}.mp4").write_bytes((root / "film.mp4").read_bytes() + number.to_bytes(8, "big"))
        lines = [f"{n // 50}.mp4,clip {n},{n % 50 / 10},{n % 50 / 10 + 1}" for n in range(count)]
        (root / "list.csv").write_text("\n".join(["video,caption,start,end", *lines]))
        peaks, done = Counter[str](), threading.Event()
        watcher = threading.Thread(target=watch, args=(peaks, done))
        watcher.start()
        start = time.monotonic()
        sources = (SourceConfig(kind="manifest", path=str(root / "list.csv")),)
        filters: Any = {"min_s": 0.5}
        run(CrawlConfig(sources=sources, out=str(root / "clips"), filters=filters, ray=RayConfig(num_cpus=2)))
        wall_s = time.monotonic() - start
        done.set()
        watcher.join()
    print(high_water_mib(), peaks["worker"], peaks["decoder"], wall_s)


def small_film() -> list[np.ndarray]:
    """150 frames of 96 x 128 pixels: six seconds."""
    base = np.kron(np.random.default_rng(0).integers(0, 255, (12, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return [np.roll(base, 3 * number, axis=1) for number in range(150)]


def watch(peaks: Counter[str], done: threading.Event) -> None:
    """Sample the peaks (MiB) of workers and decoders anywhere on this machine until `done`."""
    while not done.wait(0.25):
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                words = (folder / "cmdline").read_text()
                kind = "decoder" if "video.isolate" in words else "worker" if "MapBatches" in words else "other"
                peaks[kind] = max(peaks[kind], high_water_mib(folder))


def high_water_mib(process: Path = Path("/proc/self")) -> int:
    """Peak resident set; unlike getrusage's, not inherited from the process that started this one."""
    return int((process / "status").read_text().split("VmHWM:")[1].split()[0]) >> 10


def long_video(root: Path) -> None:
    """Peak resident set of a decoder that looks at a film of one minute and at one of two hours."""
    encode(root / "six.mp4", small_film(), {"g": "30", "bf": "2"}, vfr=False)
    print(f"\n{'film':>10}{'decoder MiB':>13}{'s':>8}")
    found = {}
    for minutes in (1, 120):
        path = root / f"{minutes}.mp4"
        repeat_packets(root / "six.mp4", path, 10 * minutes)
        code = (
            "import sys; from pipeline.clips.parent import *; p = sys.argv[1]\n"
            "rows = inspect_parent(Item(p, 'video', (Cut('film'),)).to_json(), {'local_uri': p}, '{}')\n"
            "assert rows[0]['num_frames'] % 1500 == 0, rows\n"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        found[minutes] = float(done.stdout) / 1024
        print(f"{minutes:>6} min{found[minutes]:>13.0f}{time.monotonic() - start:>8.1f}")
    print(f"2 hours / 1 minute: {found[120] / found[1]:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", help="an interpreter with img2dataset")
    args = parser.parse_args()
    if args.one:
        one(args.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        images(Path(folder), args.images, args.peer_python)
        clips(Path(folder))
        long_video(Path(folder))
    memory(args.rows)


if __name__ == "__main__":
    main()
