"""Peak memory of `vimi-data build-index` against the number of rows: driver and embedding worker.

    python tests/bench/bench_embed_memory.py [--rows 1000 10000]

Tiny pictures and a tiny random CLIP, so that the rows are many and their work is little; each size in a
process and a Ray session of its own. The kernel's own peaks (VmHWM) of the driver when
the embedding is done and at the end (it holds the ids of all documents when it tags a version), and of the
largest Ray worker; Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.pipeline.clip_tables import clip_row, picture, write_clips
from tests.pipeline.memory.test_build_index import tiny_clip

FILES = 200
CODE = """
import json, sys
from pipeline.memory.build_index import BuildIndexConfig, run
run(BuildIndexConfig.model_validate(json.loads(sys.argv[1])))
"""
ROOT = Path(__file__).resolve().parents[2]


def clips(folder: Path, rows: int) -> str:
    files = [picture(folder / f"{n}.jpg", n, size_px=(48, 64)) for n in range(FILES)]
    known = [clip_row(file, "") for file in files]
    made = []
    for n in range(rows):
        made.append({**known[n % FILES], "caption": f"wave number {n}", "clip_id": f"{n:024d}"})
    return write_clips(folder / "clips", made)


def peaks(values: dict[str, Any], out: Path) -> dict[str, float]:
    """MB: of the driver while it embeds and until the end, of the largest worker; and the seconds."""
    started_s = time.monotonic()
    command = [sys.executable, "-W", "ignore", "-c", CODE, json.dumps(values)]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = {"embedding": 0.0, "driver": 0.0, "worker": 0.0}
    while running.poll() is None:
        own = status(running.pid).get("VmHWM", 0.0)
        found["driver"] = max(found["driver"], own)
        if not (out / "lance").exists():  # the committer's table: embedding is done
            found["embedding"] = max(found["embedding"], own)
        for child in workers(running.pid):
            found["worker"] = max(found["worker"], child.get("VmHWM", 0.0))
        time.sleep(0.1)
    if running.returncode:
        raise SystemExit(f"the build failed with {running.returncode}")
    return found | {"s": time.monotonic() - started_s}


def status(pid: int) -> dict[str, Any]:
    """Name, parent and peak (MB) of a process; {} when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, Any] = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return found | {"VmHWM": int(found.get("VmHWM", "0 kB").split()[0]) / 1000}


def workers(root: int) -> list[dict[str, Any]]:
    """Ray's worker processes below this one."""
    every = {int(p.name): status(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()}

    def is_below(pid: int) -> bool:
        while pid in every and pid > 1:
            pid = int(every[pid].get("PPid", 0))
            if pid == root:
                return True
        return False

    return [
        found for pid, found in every.items() if found.get("Name", "").startswith("ray::") and is_below(pid)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = tiny_clip(folder / "tiny").model_dump(mode="json")
        print("rows, seconds; peak MB: driver while embedding, driver to the end, largest worker")
        for rows in options.rows:
            table, out = clips(folder / str(rows), rows), folder / f"memory-{rows}"
            values = {"clips": [table], "out": str(out), "clip": clip, "dedup": {"mode": "off"}}
            found = peaks(values, out)
            print(f"{rows:>9,} {found['s']:6.0f} s", end="")
            print("".join(f" {found[key]:8,.0f}" for key in ("embedding", "driver", "worker")), flush=True)


if __name__ == "__main__":
    main()
