"""A crawl whose driver, workers and children are killed ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import ray

from infra.certificate import read_certificate
from pipeline.clips import table
from pipeline.clips.crawl import CrawlConfig, run
from pipeline.clips.sources import source_from_path
from pipeline.journal import Receipts
from tests.processes import descendants

NUM_VIDEOS, UNITS_IN_HAND = 48, 2  # two workers, one unit each
SCRIPT = """
import os, sys
from infra.cluster import RayConfig, ray_session
from pipeline.clips.crawl import CrawlConfig, run
from pipeline.clips import table
from pipeline.clips.sources import source_from_path
table.ROWS_PER_PART = 17
with ray_session(RayConfig(num_cpus=2), {name: os.environ[name] for name in ("PYTHONPATH", "VISITS")}):
    run(CrawlConfig(
        sources=(source_from_path(sys.argv[1]),),
        out=sys.argv[2],
        filters={"plugins": ["slowly:slowly"]},
    ))
"""
PLUGIN = """
import os, time
def slowly(frames, row):
    with open(os.environ["VISITS"], "a") as file:
        file.write(row["source_uri"] + "\\n")
    time.sleep(0.08)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, write_video) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for number in range(NUM_VIDEOS):
        write_video(root / f"{number:02d}.mp4", seed=number % 40, size_px=(64, 64))  # 8 are copies
        (root / f"{number:02d}.txt").write_text(f"film {number % 40}")
    return root


def start(corpus: Path, out: Path, visits: Path, address: str) -> "subprocess.Popen[bytes]":
    """A driver of its own process group, with a Ray session of its own or on the tests'."""
    root = Path(__file__).resolve().parents[3]
    tools = visits.parent
    (tools / "slowly.py").write_text(PLUGIN)
    environment = {**os.environ, "PYTHONPATH": f"{root}:{tools}", "VISITS": str(visits)}
    environment |= {"RAY_ADDRESS": address}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(corpus), str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_one(above: int, rng: random.Random) -> str:
    """SIGKILL a Ray worker or a decoding child below a process; which, is drawn."""
    kind, mark = rng.choice([("worker", "ray::MapBatches"), ("child", "pipeline.media.isolate")])
    found = [pid for pid, name in sorted(descendants(above).items()) if mark in name]
    for pid in found[: 1 if kind == "child" else None]:
        os.kill(pid, signal.SIGKILL)
        return kind
    return ""


def crawl_under_fire(
    corpus: Path, out: Path, visits: Path, seed: int, kills: int, drivers: int, address: str
) -> Counter[str]:
    """Kill `kills` processes, the driver `drivers` times among them, restarting as a user would."""
    rng, done, deadline_s = random.Random(seed), Counter[str](), time.monotonic() + 240
    process = start(corpus, out, visits, address)
    while time.monotonic() < deadline_s:
        certificate = read_certificate(str(out))
        if process.poll() is not None:
            if certificate is not None:
                break
            process = start(corpus, out, visits, address)  # the same command again
        above = process.pid if address == "local" else os.getpid()  # whose session the workers belong to
        seen = len(Receipts(str(out))) if certificate is None else NUM_VIDEOS
        if 0 < seen < NUM_VIDEOS:
            if done["driver"] < drivers and seen > NUM_VIDEOS * (done["driver"] + 1) // (drivers + 1):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done["driver"] += 1
            elif done.total() - done["driver"] < kills - drivers and (kind := kill_one(above, rng)):
                done[kind] += 1
        time.sleep(rng.uniform(0.05, 0.3))
    process.wait(timeout=60)
    return done


def outputs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*.parquet"))}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("seed", "kills", "drivers"),
    [(0, 3, 1), *(pytest.param(s, 20, 2, marks=pytest.mark.slow) for s in range(1, 11))],
)
def test_killed_crawl_equals_unbroken_crawl(ray_cluster, tmp_path, corpus, seed, kills, drivers, monkeypatch):
    monkeypatch.setattr(table, "ROWS_PER_PART", 17)
    sources = (source_from_path(str(corpus)),)
    second = run(CrawlConfig(sources=sources, out=str(tmp_path / "unbroken")))
    visits = tmp_path / "visits"
    address = "local" if seed else ray.get_runtime_context().gcs_address  # a start of Ray costs seconds
    done = crawl_under_fire(corpus, tmp_path / "clips", visits, seed, kills, drivers, address)
    assert done.total() >= kills // 2, f"too few kills to mean something: {done}"
    assert done["driver"] == drivers
    assert outputs(tmp_path / "clips") == outputs(tmp_path / "unbroken")
    first = read_certificate(str(tmp_path / "clips"))
    assert first is not None
    assert (first.files, first.facts) == (second.files, second.facts)
    assert (first.num_in, first.num_out, first.filtered) == (NUM_VIDEOS, 40, {"filtered_duplicate": 8})
    seen = visits.read_text().splitlines()
    assert len(set(seen)) == NUM_VIDEOS
    assert len(seen) - NUM_VIDEOS <= UNITS_IN_HAND * done.total()
