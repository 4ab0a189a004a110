"""Ray clusters of this machine for slow tests: a head without CPUs, workers started by its autoscaler.

Ray's own helper (`ray.cluster_utils.AutoscalingCluster`) stops every Ray process of the machine; this one marks
its own and stops those alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.model.runs import free_port

ROOT = Path(__file__).resolve().parents[2]
HEAD = "ray.head.default"
"""What Ray's provider of fake nodes calls the type of its head."""
LISTS = ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands")
LISTS += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
LISTS += ("rsync_exclude", "rsync_filter")
EMPTY = {name: [] for name in LISTS} | {name: {} for name in ("auth", "docker", "file_mounts")}
"""Fields that Ray's autoscaler wants to find, though a fake node needs none of them."""
MARK = "VIMI_FAKE_CLUSTER"


@contextmanager
def fake_cluster(
    *, cpus: int = 2, most: int = 1, dashboard_port: int | None = None
) -> Iterator[dict[str, str]]:
    """Environment of a driver of the cluster; from 0 to `most` workers of `cpus` CPUs."""
    address = f"{own_address()}:{free_port()}"
    worker = {"resources": {"CPU": cpus, "object_store_memory": 200_000_000}, "node_config": {}}
    config = {
        **EMPTY,
        "file_mounts_sync_continuously": False,
        "cluster_name": "fake_multinode",
        "max_workers": most,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,  # they share one
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {**worker, "min_workers": 0, "max_workers": most},
        },
    }
    folder = Path(tempfile.mkdtemp(prefix="rc-"))
    (folder / "cluster.json").write_text(json.dumps(config))
    mark = uuid.uuid4().hex
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        MARK: mark,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
    }
    words = ["start", "--head", f"--port={address.rpartition(':')[2]}", "--num-cpus=0", "--num-gpus=0"]
    words += [f"--temp-dir={folder}", f"--autoscaling-config={folder / 'cluster.json'}"]
    words += ["--object-store-memory=200000000", "--disable-usage-stats", "--metrics-export-port=0"]
    words += [f"--include-dashboard={'true' if dashboard_port else 'false'}"]
    words += [f"--dashboard-agent-listen-port={free_port()}"]  # Ray's own may be another cluster's
    words += [f"--dashboard-port={dashboard_port}"] if dashboard_port else []
    ray = Path(sys.executable).parent / "ray"
    try:
        started = subprocess.run(
            [str(ray), *words], env=environment, capture_output=True, text=True, timeout=180, check=False
        )
        assert started.returncode == 0, started.stdout[-1000:] + started.stderr[-2000:]
        yield {**environment, "RAY_ADDRESS": address}
    finally:
        stop(mark)
        shutil.rmtree(folder, ignore_errors=True)


def own_address() -> str:
    import ray

    return ray.util.get_node_ip_address()


def stop(mark: str) -> None:
    """End the processes whose environment bears the mark."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        for pid in marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, end)
        time.sleep(2)


def marked(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def command(environment: dict[str, str], program: str, *words: str, cwd: Path) -> str:
    """Run a command to its end; what it said."""
    module = {"vimi-data": "cli.data", "vimi-train": "cli.train"}[program]
    code = f"from {module} import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return result.stdout + result.stderr
