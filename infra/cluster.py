"""Starts or joins the Ray session: local by default, a cluster when asked.

Ray puts the driver's current directory first on its workers' import path, so a user's own `model/` or
`pipeline/` folder there would shadow ours (tried: it does). The session therefore starts with a
`working_dir` of its own, empty, and `PYTHONPATH` pointing at this checkout; paths are made absolute at
the door (`infra.storage.absolute`).
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from infra.config import Config

CHECKOUT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 400_000_000
"""Shared memory of a local session: blocks of rows pass through it, tables don't (ours)."""


class RayConfig(Config):
    """Where the job runs."""

    address: str = "local"
    """`local` = a session of its own on this machine; `auto` or `ray://host:port` = a running cluster.
    The environment variable RAY_ADDRESS, when set, wins over `local`."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of a local session; None = all."""
    dashboard: bool = False
    """Start Ray's dashboard in a local session, and say where it is."""


@contextmanager
def ray_session(config: RayConfig, env_vars: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run the body inside a Ray session; one that is already connected is used and left alone.

    Args:
        config: where.
        env_vars: for the environment of all workers of a session that is opened here.
    """
    quiet()
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or config.address
    if config.dashboard or address != "local":
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's page of trainings
    with tempfile.TemporaryDirectory(prefix="vimi-ray-") as empty:
        runtime_env = {"working_dir": empty, "env_vars": {**worker_environment(), **(env_vars or {})}}
        if address == "local":
            # No node of this machine is ever drained: a process less to start, and to start again.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            context = ray.init(
                address="local",
                num_cpus=config.num_cpus,
                include_dashboard=config.dashboard,
                object_store_memory=OBJECT_STORE_BYTES,
                runtime_env=runtime_env,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            if config.dashboard:
                where = f"http://{context.dashboard_url}, the token it asks for: `ray get-auth-token`"
                print(f"  Ray's dashboard: {where}", file=sys.stderr, flush=True)
        else:
            # On a cluster the image holds the code: PYTHONPATH of this machine would be wrong there.
            there = {"working_dir": empty, "env_vars": dict(env_vars or {})}
            ray.init(address=address, runtime_env=there, logging_level=logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()


def worker_environment() -> dict[str, str]:
    """Environment of the local workers: our checkout is importable, their threads don't multiply."""
    paths = [str(CHECKOUT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TOKENIZERS_PARALLELISM": "false"}


def quiet() -> None:
    """Keep Ray's progress bars and usage note off the terminal: jobs print their own progress."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def quiet_ray_data() -> None:
    """Leave Ray Data's execution log to its file; it sets its loggers up at import, so call after that."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)
