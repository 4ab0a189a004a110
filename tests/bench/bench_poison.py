"""One per cent of poison of twelve kinds: what is lost, what is recorded, what a clean crawl pays for it.

    python tests/bench/bench_poison.py [--videos 1200]

Clean cost: the same good videos inspected in the child process and in this one, in turn: the smallest
films there are (1 s of 120x90 pixels, about a millisecond of work) and ordinary clips (5 s of 1280x720).
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
from bench_decode import encode, film

from infra.cluster import RayConfig
from pipeline.clips.crawl import CrawlConfig, run
from pipeline.clips.filters import FilterConfig
from pipeline.clips.parent import inspect_parent
from pipeline.clips.sources import Item, SourceConfig
from pipeline.media.isolate import Isolated

PLUGIN = """
import os
import numpy as np
def native(frames, row):
    if row["caption"] == "crash":
        os.abort()                      # what a decoder does that runs into its own assertion
    if row["caption"] == "memory bomb":
        np.ones(1 << 40, np.uint8)
"""


def write_video(path: Path, seed: int, count: int = 24, times: list[Fraction] | None = None) -> None:
    """A film of 9 x 12 moving blocks."""
    rng = np.random.default_rng(seed)
    base = np.kron(rng.integers(0, 255, (9, 12, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 90, 120, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 24000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(base, 3 * number, axis=1), format="rgb24")
            frame.pts = round((times[number] if times else Fraction(number, 24)) * 24000)
            frame.time_base = Fraction(1, 24000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def poison(root: Path, port: int) -> list[dict[str, Any]]:
    """Twelve rows with the fate that each must have (VFR must live)."""
    write_video(root / "vfr.mp4", 7001, times=[Fraction(n * n, 300) for n in range(24)])
    whole = root / "whole.mp4"
    write_video(whole, 7002)
    data = whole.read_bytes()
    (root / "truncated.mp4").write_bytes(data[: data.index(b"moov") - 20])
    (root / "empty.mp4").write_bytes(b"")
    (root / "zero.mp4").write_bytes(data[: data.index(b"mdat") + 4])
    (root / "extension.mp4").write_text("<html>no film</html>")
    (root / "huge.bmp").write_bytes(
        b"BM" + bytes(12) + (40).to_bytes(4, "little") + b"\xff\xff\0\0" * 2 + b"\1\0\x18\0" + bytes(24)
    )
    os.mkfifo(root / "hang.mp4")
    for number, name in enumerate(("crash", "bomb", "latin")):
        write_video(root / f"{name}.mp4", 7010 + number)
    return [
        {"video": "vfr.mp4", "caption": "vfr", "fate": "ok"},
        {"video": "truncated.mp4", "caption": "truncated moov", "fate": "undecodable"},
        {"video": "empty.mp4", "caption": "empty", "fate": "empty"},
        {"video": "zero.mp4", "caption": "zero frames", "fate": "undecodable"},
        {"video": "extension.mp4", "caption": "wrong type", "fate": "wrong_type"},
        {"video": "huge.bmp", "caption": "huge dimensions", "fate": "too_large"},
        {"video": "hang.mp4", "caption": "hang", "fate": "timeout"},
        {"video": "crash.mp4", "caption": "crash", "fate": "crashed"},
        {"video": "bomb.mp4", "caption": "memory bomb", "fate": "too_large"},
        {"video": "latin.mp4", "caption": b"caf\xe9", "fate": "bad_caption"},
        {"video": "whole.mp4", "caption": "lying duration", "end": 3600, "fate": "bad_range"},
        {"video": f"http://127.0.0.1:{port}/absent.mp4", "caption": "404", "fate": "not_found"},
    ]


class NotFound(BaseHTTPRequestHandler):
    """A site that has nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_error(404)


def line(row: dict[str, Any]) -> bytes:
    caption = row["caption"] if isinstance(row["caption"], bytes) else row["caption"].encode()
    end = str(row.get("end", "")).encode()
    return b",".join([row["video"].encode(), caption, b"0" if end else b"", end])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=1200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "bad_plugin.py").write_text(PLUGIN)
        os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        sys.path.insert(0, str(root))
        server = ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        good = [{"video": f"{n:05d}.mp4", "caption": f"film {n}", "fate": "ok"} for n in range(args.videos)]
        for number, row in enumerate(good):
            write_video(root / row["video"], number)
        rows = good + poison(root, server.server_port)
        (root / "list.csv").write_bytes(b"\n".join([b"video,caption,start,end", *map(line, rows)]))
        table, wall_s = crawl(root)
        report(rows, table, wall_s)
        clean_cost([str(root / row["video"]) for row in good[:400]], "1 s of 120x90")
        ordinary = [root / f"ordinary-{number}.mp4" for number in range(4)]
        frames = film(150)
        for number, path in enumerate(ordinary):
            encode(path, frames[10 * number :][:120], {"g": "30", "bf": "2"}, vfr=False)
        clean_cost([str(path) for path in ordinary], "5 s of 1280x720")


def crawl(root: Path) -> tuple[dict[str, str], float]:
    start = time.monotonic()
    certificate = run(
        CrawlConfig.model_validate(
            {
                "sources": [SourceConfig(kind="manifest", path=str(root / "list.csv"))],
                "out": str(root / "clips"),
                "filters": {"plugins": ["bad_plugin:native"]},
                "fetch": {"allow_hosts": ["127.0.0.1"], "honour_robots": False},
                "timeout_s": 3.0,
                "ray": RayConfig(num_cpus=2),
            }
        )
    )
    files = [pq.read_table(root / "clips" / file.path) for file in certificate.files]
    rows = [row for file in files for row in file.to_pylist()]
    found = {row["source_uri"].removeprefix(f"{root}/"): row["status"] for row in rows}
    return found, time.monotonic() - start


def report(rows: list[dict[str, Any]], found: dict[str, str], wall_s: float) -> None:
    bad = [row for row in rows if row["fate"] != "ok"]
    good = [row for row in rows if row["fate"] == "ok"]
    print(f"{'poison':<18}{'must be':<14}{'is':<14}")
    for row in bad:
        print(f"{row['caption']!s:<18}{row['fate']:<14}{found.get(row['video'], 'LOST'):<14}")
    lost = sum(found.get(row["video"]) != "ok" for row in good)
    right = sum(found.get(row["video"]) == row["fate"] for row in bad)
    print(f"good rows lost: {lost} of {len(good)} · bad rows right: {right} of {len(bad)} · {wall_s:.1f} s")
    print(Counter(found.values()))


def clean_cost(paths: list[str], what: str) -> None:
    """The price of isolation when nothing is bad: wall time in the child against in this process."""
    settings = ("whole", FilterConfig())
    child = Isolated(timeout_s=60)
    items = [(Item(path, "video").to_json(), {"local_uri": path}, *settings) for path in paths]
    inspect_parent(*items[0])
    child.call("pipeline.clips.parent:inspect_parent", *items[0])
    here_s, there_s = [], []
    for _ in range(5):  # in turn, video by video: both see the same machine
        for item in items:
            start = time.perf_counter()
            inspect_parent(*item)
            middle = time.perf_counter()
            child.call("pipeline.clips.parent:inspect_parent", *item)
            here_s.append(middle - start)
            there_s.append(time.perf_counter() - middle)
    child.close()
    here, there = statistics.median(here_s), statistics.median(there_s)
    cost = f"{1e3 * here:.2f} ms -> {1e3 * there:.2f} ms"
    print(f"clean cost of isolation, {what}: {cost} a video, {100 * (there / here - 1):+.1f} %")


if __name__ == "__main__":
    main()
