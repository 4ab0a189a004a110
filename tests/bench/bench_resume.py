"""How long a kill costs: SIGKILL of the training worker until the next optimizer step of the run.

    python tests/bench/bench_resume.py [--kills 3]

Every step is logged; a worker is killed past each further checkpoint.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

from tests.model import conftest
from tests.model.runs import Driver, logged


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:  # a worker may still write
        folder = Path(name)
        rows = [conftest.prompt_row(n, num_frames=4, height=12, width=16) for n in range(40)]
        conftest.write_shards(folder / "prompts", rows, job="augment", group_rows=8, file_rows=40)
        values = conftest.tiny_stage(folder / "prompts", folder / "run", conftest.write_tiny_encoder(folder))
        values |= {
            "samples": 400_000,
            "validation": {"num_samples": 0, "held_out_frac": 0},
            "checkpoint": {"every_samples": 400, "num_to_keep": 3},
            "log_every_samples": 4,
            "trackers": [],
            "ray": {"num_cpus": 2},
        }
        started_s = time.perf_counter()
        driver = Driver(folder, values)
        driver.wait_for_samples(4)
        print(f"command to first step              {time.perf_counter() - started_s:6.1f} s", flush=True)
        took_s = [kill_worker(driver) for _ in range(options.kills)]
        driver.kill()
    each = ", ".join(f"{t:.1f}" for t in took_s)
    print(f"SIGKILL of worker to next step     {statistics.median(took_s):6.1f} s (median of {each})")


def kill_worker(driver: Driver) -> float:
    """Seconds from the kill to the first step of the worker that takes its place."""
    driver.wait_for_samples(max(logged(driver.run)) + 800)  # past a checkpoint
    os.kill(driver.worker(), signal.SIGKILL)
    killed_s = time.perf_counter()
    time.sleep(0.3)
    before = (driver.run / "metrics.jsonl").stat().st_ino
    while (driver.run / "metrics.jsonl").stat().st_ino == before:
        time.sleep(0.02)  # the new worker first writes the log anew, cut back to its checkpoint
    cut = len(logged(driver.run))
    while len(logged(driver.run)) <= cut:
        time.sleep(0.02)
    return time.perf_counter() - killed_s


if __name__ == "__main__":
    main()
