"""The same crawl with its corpus and its output on an object store: same rows, also after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infra.certificate import read_certificate
from infra.storage import filesystem, list_files, write_bytes
from pipeline.journal import Receipts

ROOT = Path(__file__).resolve().parents[3]
NUM_VIDEOS = 24


def start(*arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", "from cli.data import main; main()", "crawl", *arguments]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def rows(out: str) -> list[dict]:
    certificate = read_certificate(out)
    assert certificate is not None
    tables = []
    for file in certificate.files:
        fs, path = filesystem(f"{out}/{file.path}")
        tables += pq.read_table(path, filesystem=fs).to_pylist()
    drop = {"source_uri", "local_uri", "source_name"}
    return [{k: v for k, v in row.items() if k not in drop} for row in tables]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_crawl_on_an_object_store_equals_an_unbroken_one_on_disk(s3_server, tmp_path, write_video):
    for number in range(NUM_VIDEOS):
        write_video(tmp_path / "corpus" / f"{number:02d}.mp4", seed=number, size_px=(64, 64))
        (tmp_path / "corpus" / f"{number:02d}.txt").write_text(f"film {number}")
    for file in (tmp_path / "corpus").iterdir():
        write_bytes(f"s3://bucket/cats #1?/{file.name}", file.read_bytes())
    local = start(str(tmp_path / "corpus"), "--out", str(tmp_path / "clips"))
    assert local.wait(timeout=240) == 0
    broken = start("s3://bucket/cats #1?", "--out", "s3://bucket/clips 100%")
    deadline_s = time.monotonic() + 240
    while not len(Receipts("s3://bucket/clips 100%")) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    assert start("s3://bucket/cats #1?", "--out", "s3://bucket/clips 100%").wait(timeout=240) == 0
    found = rows("s3://bucket/clips 100%")
    assert found == rows(str(tmp_path / "clips"))
    assert [row["status"] for row in found] == ["ok"] * NUM_VIDEOS
    assert not list_files("s3://bucket/clips 100%/journal")
