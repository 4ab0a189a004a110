"""Augment may be killed at any moment, driver or worker: the shards are those of an unbroken run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.certificate import read_certificate
from infra.storage import list_files
from pipeline.prompts.augment import AugmentConfig, run
from tests.processes import descendants

pytestmark = pytest.mark.ray

DRIVER = """
import sys
from pipeline.prompts.augment import AugmentConfig, run
run(AugmentConfig.load(sys.argv[1]))
"""


def write_config(world: Any, folder: Path, out: Path) -> Path:
    path = folder / f"{out.name}.yaml"
    path.write_text(
        f"clips: {world.clips}\nmemory: {world.memory}\nout: {out}\nshard_rows: 1\nnum_workers: 2\n"
    )
    return path


def contents(out: Path) -> dict[str, bytes]:
    return {Path(f).name: Path(f).read_bytes() for f in list_files(str(out), suffix=".parquet")}


def start(config: Path, address: str) -> subprocess.Popen[bytes]:
    """A driver of its own process group, on the session's cluster (a start of Ray costs seconds)."""
    checkout = str(Path(__file__).resolve().parents[4])
    with log_of(config).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(config)],
            env=os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": checkout},
            stderr=log,
            start_new_session=True,
            cwd=checkout,
        )


def log_of(config: Path) -> Path:
    return config.with_suffix(".log")


def stop_somewhere(config: Path, out: Path, address: str, seed: int) -> bool:
    """Start the job and kill the driver or a worker of it at a drawn moment; was anything killed?"""
    draw = random.Random(seed)
    wanted = draw.randrange(24)  # shards that are there when the blow falls
    driver = start(config, address)
    try:
        while driver.poll() is None and len(list(out.glob("part-*.parquet"))) < wanted:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        if driver.poll() is not None:
            assert driver.returncode == 0, log_of(config).read_text()[-2000:]  # else it would be tried for ever
            return False
        below = descendants(os.getpid())  # never those of a stranger's session
        found = [pid for pid, name in below.items() if name.startswith("ray::MapBatches(BlockRunner)")]
        if draw.random() < 0.4 and found:
            os.kill(draw.choice(found), signal.SIGKILL)
            driver.wait(timeout=240)  # Ray runs the lost block again
            assert driver.returncode == 0, log_of(config).read_text()[-2000:]
        return True
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def survive(world: Any, folder: Path, kills: int) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    calm = folder / "calm"
    certificate = run(AugmentConfig.load(write_config(world, folder, calm)))
    expected = contents(calm)
    killed = seed = number = 0
    while killed < kills:
        out = folder / f"out-{number}"
        config = write_config(world, folder, out)
        for _ in range(4):  # the same job is killed several times over
            if killed < kills and read_certificate(out) is None:
                killed += stop_somewhere(config, out, address, seed)
                seed += 1
        after = run(AugmentConfig.load(config))
        assert contents(out) == expected
        assert after.content_hash() == certificate.content_hash()
        left = {path.name for path in out.iterdir()} - {path.name for path in calm.iterdir()}
        assert not left
        number += 1


def test_a_killed_job_ends_in_the_same_bytes(world: Any, ray_cluster: None, tmp_path: Path) -> None:
    survive(world, tmp_path, kills=2)


@pytest.mark.slow
def test_fifty_seeded_kills_end_in_the_same_bytes(world: Any, ray_cluster: None, tmp_path: Path) -> None:
    survive(world, tmp_path, kills=50)
