"""How long a kill costs: SIGKILL of the training worker until the next logged step of the run.

    python tests/bench/bench_resume.py

Also times the parts that a resume is made of: reading the checkpoint, opening the training.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
CODE = "import sys; from model.training.train import Stage1Config, run; run(Stage1Config.load(sys.argv[1]))"


def records(run: Path) -> list[int]:
    place = run / "metrics.jsonl"
    lines = place.read_text().split("\n")[:-1] if place.exists() else []
    return [json.loads(line)["samples"] for line in lines]


def wait_for(run: Path, process: subprocess.Popen[bytes], samples: int) -> float:
    while process.poll() is None:
        if any(found >= samples for found in records(run)):
            return time.perf_counter()
        time.sleep(0.02)
    raise SystemExit("the run ended early")


def main() -> None:
    conftest: Any = importlib.import_module("conftest")  # the tests' maker of shards
    from test_train import training_worker  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [conftest.prompt_row(n, num_frames=4, height=12, width=16) for n in range(40)]
        conftest.write_shards(folder / "prompts", rows, job="augment", group_rows=8, file_rows=40)
        values = {
            "prompts": str(folder / "prompts"), "out": str(folder / "run"), "samples": 4000, "batch_size": 4,
            "preset": "fit-tiny", "num_frames": 4, "height_px": 12, "width_px": 16,
            "backbone": conftest.TINY_BACKBONE, "encoder": conftest.write_tiny_encoder(folder),
            "optim": {"name": "adamw"}, "validation": {"num_samples": 0}, "ray": {"num_cpus": 1},
            "checkpoint": {"every_samples": 40}, "log": {"every_samples": 4},
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        started_s = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", CODE, str(folder / "config.yaml")]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        first_s = wait_for(folder / "run", process, 4) - started_s
        wait_for(folder / "run", process, 100)
        os.kill(training_worker(process.pid), signal.SIGKILL)
        killed_s, before = time.perf_counter(), len(records(folder / "run"))
        time.sleep(0.3)
        while process.poll() is None and len(records(folder / "run")) >= before:
            time.sleep(0.02)  # the resumed run first cuts its log back to the checkpoint
        cut = max(records(folder / "run"), default=0)
        wait_for(folder / "run", process, cut + 4)
        took_s = time.perf_counter() - killed_s
        process.kill()
        process.wait()
        print(f"command to first step           {first_s:6.1f} s")
        print(f"SIGKILL of worker to next step  {took_s:6.1f} s")


if __name__ == "__main__":
    main()
