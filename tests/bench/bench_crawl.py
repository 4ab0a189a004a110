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
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from pipeline.crawl.duplicates import find_duplicates
from pipeline.crawl.job import CrawlConfig, Worker
from pipeline.crawl.parent import InspectConfig, inspect_parent
from pipeline.schema import content_id
from pipeline.sources import Cut, Item, SourceConfig

SERVER = """
import sys, http.server, functools
class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=sys.argv[1]))
print(s.server_port, flush=True)
s.serve_forever()
"""


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
            "fetch": {"allow_hosts": ["127.0.0.1"], "per_host_per_s": 1e6, "per_host_concurrency": 16},
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
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(0, 255, (45, 80, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "30", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = 360, 640, "yuv420p"
        for number in range(750):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 3 * number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    cuts = tuple(Cut(f"clip {n}", n * 5.0, n * 5.0 + 5.0) for n in range(6))
    start = time.process_time()
    rows = inspect_parent(
        Item(str(path), "video", cuts).to_json(), {"local_uri": str(path)}, InspectConfig().model_dump_json()
    )
    range_s = time.process_time() - start
    start = time.process_time()
    for cut in cuts:
        cut_exactly(path, root / "cut.mp4", cut)
    exact_s = time.process_time() - start
    good = sum(row["status"] == "ok" for row in rows)
    print(
        f"\n{good} clips of 5 s, 640x360: as ranges {range_s:.3f} CPU-s, cut exactly (x264 default preset, as"
    )
    print(f"video2dataset's precise clipping does) {exact_s:.2f} CPU-s: {exact_s / range_s:.0f}x")


def cut_exactly(source: Path, path: Path, cut: Cut) -> None:
    assert cut.start_s is not None and cut.end_s is not None
    with av.open(str(source)) as reader, av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 360, 640, "yuv420p"
        reader.seek(int(cut.start_s * 1_000_000))
        for frame in reader.decode(video=0):
            if frame.time >= cut.end_s:
                break
            if frame.time >= cut.start_s:
                frame.pts = None
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def memory(counts: list[int]) -> None:
    """Peak resident set of the driver's own work (duplicates over all rows), a fresh process each."""
    print(f"\n{'rows':>10}{'peak RSS MiB':>14}")
    for count in counts:
        command = [sys.executable, __file__, "--one", str(count)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        print(f"{count:>10,}{float(found.stdout):>14.0f}")


def one(count: int) -> None:
    rows = (
        {"clip_id": content_id(n), "status": "ok", "phash": n * 7919, "start_s": 0.0, "end_s": 1.0}
        for n in range(count)
    )
    find_duplicates(rows, 2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


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
    memory(args.rows)


if __name__ == "__main__":
    main()
