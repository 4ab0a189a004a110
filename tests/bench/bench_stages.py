"""CPU seconds and object-store requests of each job, by the real commands, at growing numbers of clips.

    python tests/bench/bench_stages.py [--rows 60 240] [--size 640 360] [--profile FILE]

The corpus lies on a real S3-compatible server on loopback (moto), which counts what it is asked, and so does
all output. Clips are drawn (2 s, 24 frames a second); the offline CLIP embeds and encodes. CPU seconds are of
the command and all processes below it, Ray's too, sampled five times a second. With --profile they become what
`vimi-data plan` fits its laws to: what every clip takes is the slope, and Ray's start goes into the constant.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs

from infra.storage import write_bytes
from model.data.shards import open_parquet, open_shards
from tests.model.prompt_tables import moving_square, mp4

BUCKET = "s3://bench"
FPS, SECONDS = 24, 2
JOBS = {
    "crawl": "crawl {s3}/videos.jsonl --out {s3}/clips",
    "build-index": "build-index {s3}/clips --out {s3}/memory --clip offline",
    "augment": "augment {s3}/clips --memory {s3}/memory --retriever bm25 -k 3 --out {s3}/prompts",
    "encode": "encode {s3}/prompts --out {s3}/encodings --set encoder.clip.name=offline",
}
"""Job -> its command; the options are those that make it run without a hub."""


class Requests(logging.Handler):
    """Counts what the server is asked, by method: werkzeug logs a line each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(
            r'"(?:\x1b\[[\d;]*m)*(GET|PUT|HEAD|POST|DELETE) ', record.getMessage()
        )  # some in colour
        if found:
            self.counts[found[1]] += 1

    def take(self) -> Counter[str]:
        counts, self.counts = self.counts, Counter()
        return counts


def serve() -> tuple[Any, Requests]:
    """A running server, and what counts its requests; the environment points pyarrow at it."""
    from moto.server import ThreadedMotoServer

    requests = Requests()
    log = logging.getLogger("werkzeug")
    log.setLevel(logging.INFO)
    log.handlers, log.propagate = [requests], False
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=True)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    store = pafs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
    store.create_dir(BUCKET.removeprefix("s3://"))
    return server, requests


def cpu_seconds(command: list[str], log: Path) -> float:
    """Of a command and of all processes that it starts, each at its last sight.

    Raises:
        SystemExit: it failed; its output is printed.
    """
    spent: dict[int, float] = {}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        while process.poll() is None:
            for one in family(process.pid):
                try:
                    times = one.cpu_times()
                    spent[one.pid] = times.user + times.system
                except psutil.Error:
                    continue
            time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return sum(spent.values())


def family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def put_corpus(folder: str, rows: int, size_px: tuple[int, int]) -> None:
    """`rows` clips, no two alike, and a manifest that names them."""
    width, height = size_px
    lines = []
    for number in range(rows):
        frames = moving_square(number, num_frames=FPS * SECONDS, height=height, width=width)
        frames[:, : 1 + number // 250, : 1 + number % 250] = 255  # no two have one hash
        write_bytes(f"{folder}/videos/{number}.mp4", mp4(frames, fps=FPS))
        caption = f"A square number{number} moves to the right of a dark room."
        lines.append(json.dumps({"id": str(number), "path": f"videos/{number}.mp4", "caption": caption}))
    write_bytes(f"{folder}/videos.jsonl", "\n".join(lines).encode())


def run(rows: int, size_px: tuple[int, int], requests: Requests) -> dict[str, dict[str, Any]]:
    """Job -> rows, cpu_s and requests of one run of its command."""
    folder = f"{BUCKET}/{rows}"
    put_corpus(folder, rows, size_px)
    found = {}
    program = str(Path(sys.executable).with_name("vimi-data"))
    for job, words in JOBS.items():
        requests.take()
        with tempfile.TemporaryDirectory() as logs:
            cpu_s = cpu_seconds([program, *words.format(s3=folder).split()], Path(logs, "log"))
        counts = requests.take()
        found[job] = {"rows": rows, "cpu_s": round(cpu_s, 2), "requests": counts.total()}
        print(f"  {job:12} {cpu_s:8.1f} CPU s  {counts.total():7,} requests  {dict(counts)}", flush=True)
    shards = open_shards(f"{folder}/prompts")
    requests.take()
    for group in shards.groups:
        open_parquet(group.uri).read_row_group(group.index)
    count = requests.take().total()
    found["read"] = {"rows": len(shards.groups), "cpu_s": 0.0, "requests": count}
    print(f"  {len(shards.groups)} row groups of prompts read: {count} requests")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[60, 240])
    parser.add_argument("--size", type=int, nargs=2, default=(640, 360), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--profile", help="write the runs into this file, for `vimi-data plan`")
    options = parser.parse_args()
    server, requests = serve()
    runs: dict[str, list[dict[str, Any]]] = {}
    for rows in options.rows:
        print(f"{rows:,} clips of {options.size[0]} x {options.size[1]}, {SECONDS} s")
        for job, found in run(rows, tuple(options.size), requests).items():
            runs.setdefault(job, []).append(found)
    server.stop()
    if options.profile:
        place = Path(options.profile)
        profile = json.loads(place.read_text()) if place.exists() else {}
        clip = f"bench_stages.py, clips of {SECONDS} s, {options.size[0]} x {options.size[1]}, offline CLIP"
        profile["stages"] = {"what": clip, **runs}
        place.write_text(json.dumps(profile, indent=1) + "\n")


if __name__ == "__main__":
    main()
