"""Starts or joins the Ray session: local by default, a cluster when asked.

Ray puts the driver's current directory first on its workers' import path, so a user's own `model/` or
`pipeline/` folder there would shadow ours (tried: it does). The session therefore starts with a
`working_dir` of its own, empty, and `PYTHONPATH` pointing at this checkout; paths are made absolute at
the door (`infra.storage.absolute`).
"""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.certificate import TRUST
from infra.config import ALLOW_IMPORTS, Config
from infra.errors import EXIT_TERMINATED, ConfigError, VimiError
from infra.progress import say

CHECKOUT = Path(__file__).resolve().parent.parent
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for what `ray job submit` runs; such a driver has a runtime environment already."""
OBJECT_STORE_BYTES = 400_000_000
"""Shared memory of a local session: blocks of rows pass through it, tables don't (ours)."""

LOOK_EVERY_S = 3.0
"""How often a waiting job looks for what the cluster has no room for (ours)."""


class RayConfig(Config):
    """Where the job runs."""

    address: str = "local"
    """`local` = a session of its own on this machine; `auto` or `ray://host:port` = a running cluster.
    The environment variable RAY_ADDRESS, when set, wins over `local`."""
    num_cpus: int | None = Field(default=None, ge=1, le=4096)
    """CPUs of a local session; None = all."""
    gpus: bool | None = None
    """Whether a worker that trains or embeds asks for a GPU; None = if there is one at the start. A cluster
    that starts from none shows none, so say it there."""
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
    address, is_submitted = address_of(config), IN_A_JOB in os.environ  # by `ray job submit`
    if config.dashboard or address != "local":
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's page of trainings
    with tempfile.TemporaryDirectory(prefix="vimi-ray-") as empty:
        switches = {name: os.environ[name] for name in (TRUST, ALLOW_IMPORTS) if name in os.environ}
        env_vars = {**switches, **(env_vars or {})}
        runtime_env = {"working_dir": empty, "env_vars": {**worker_environment(), **env_vars}}
        if address == "local":
            # No node of this machine is ever drained: a process less to start, and to start again.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            context = _start(
                address="local",
                num_cpus=config.num_cpus,
                include_dashboard=config.dashboard,
                object_store_memory=OBJECT_STORE_BYTES,
                runtime_env=runtime_env,
                log_to_driver=False,
            )
            if config.dashboard:
                where = f"http://{context.dashboard_url}, the token it asks for: `ray get-auth-token`"
                print(f"  Ray's dashboard: {where}", file=sys.stderr, flush=True)
        else:
            # On a cluster the image holds the code: PYTHONPATH of this machine would be wrong there.
            there: dict[str, Any] = {"working_dir": empty, "env_vars": env_vars}
            if is_submitted:  # its --working-dir stays
                del there["working_dir"]
                os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
            _start(address=address, runtime_env=there)
        try:
            with nullcontext() if address == "local" else say_what_is_awaited():
                yield
        finally:
            if is_submitted:
                os.chdir("/")  # with its session Ray takes the job's folder away, and we stand in it
            with own_sigterm():
                ray.shutdown()


def address_of(config: RayConfig) -> str:
    return os.environ.get("RAY_ADDRESS") or config.address


def is_cluster(config: RayConfig) -> bool:
    """Whether the job runs on a cluster, which may start from no node and grow by what is asked for."""
    return address_of(config) != "local"


def wants_gpus(config: RayConfig) -> bool:
    """Whether workers that train or embed ask for GPUs; call inside a `ray_session`.

    Raises:
        ConfigError: they should, but this machine has none.
    """
    import ray

    there = ray.cluster_resources().get("GPU", 0) >= 1
    if is_cluster(config):
        if config.gpus is None and not there:
            say("  no node of the cluster has a GPU now, so none is asked for; else: --set ray.gpus=true")
        return there if config.gpus is None else config.gpus
    if config.gpus and not there:
        raise ConfigError("ray.gpus true, but this machine has none", cure="leave it out, or name a cluster")
    return there and config.gpus is not False


def may_use_gpu() -> bool:
    """Whether a GPU that this process sees is its own: Ray hides none from workers that asked for none."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return True
    context = ray.get_runtime_context()
    return context.worker.mode != ray.WORKER_MODE or bool(context.get_accelerator_ids().get("GPU"))


def _start(**options: Any) -> Any:
    """`ray.init`, whose own errors become a line.

    Raises:
        ConfigError: no cluster at the address, or no room for Ray's own files.
        VimiError: a session of this machine did not start in time.
    """
    import ray
    from ray.exceptions import AuthenticationError

    try:
        with own_sigterm():
            return ray.init(logging_level=logging.ERROR, **options)
    except SystemExit:  # of the handlers of SIGTERM that Ray has while it starts: one ends with 15, one with 1
        raise SystemExit(EXIT_TERMINATED) from None
    except Exception as error:  # Ray raises several kinds; what is none of these is raised again
        text = " ".join(str(error).split())
        if isinstance(error, AuthenticationError):
            raise ConfigError(
                f"the Ray cluster at {options['address']!r} asks for its token, which is not here",
                cure="put what `ray get-auth-token` prints there into RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token",
            ) from None
        if isinstance(error, ConnectionError):
            raise ConfigError(
                f"no Ray cluster answers at {options['address']!r}: {text[:200]}",
                cure="start it, mend RAY_ADDRESS or ray.address, or bring its token: RAY_AUTH_TOKEN and "
                "RAY_AUTH_MODE=token (docs/cluster.md)",
            ) from None
        if isinstance(error, OSError):
            raise ConfigError(
                f"Ray can't make its own folder: {text[:200]}",
                cure="set RAY_TMPDIR to a short path where this user may write",
            ) from None
        if "timed out during startup" in text:
            raise VimiError(
                "Ray did not start in time; cure: run it again when the machine is less busy, with fewer CPUs "
                "(--set ray.num_cpus=2), or with room in the temporary folder"
            ) from None
        raise


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Put back the handler of SIGTERM, if there was one: at its start Ray sets its own, at its end none."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def say_what_is_awaited() -> Iterator[None]:
    """Say which resources no node of the cluster has free, while that is so: a cluster may start from none."""
    stop = threading.Event()

    def watch() -> None:
        said = ""
        while not stop.wait(LOOK_EVERY_S):
            wanted = awaited()
            if wanted and wanted != said:
                say(f"  waiting for nodes of the cluster with {wanted}")
            said = wanted

    thread = threading.Thread(target=watch, name="awaited", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def awaited() -> str:
    """What tasks, actors and placement groups ask for and no node can hold, in words; empty = nothing."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # noqa: BLE001 - only words hang on it
        return ""
    demands = status.resource_demands
    wanted = [
        bundle
        for demand in (*demands.ray_task_actor_demand, *demands.placement_group_demand)
        for bundle in demand.bundles_by_count
    ]
    totals = [
        node.resource_usage.usage
        for node in (*status.active_nodes, *status.idle_nodes)
        if node.resource_usage is not None
    ]
    nodes = [{part.resource_name: part.total for part in usage} for usage in totals]
    short = {
        " and ".join(f"{v:g} {k}" for k, v in sorted(part.bundle.items()) if not k.startswith("bundle_group"))
        for part in wanted
        if not any(all(node.get(k, 0) >= v for k, v in part.bundle.items()) for node in nodes)
    }
    return ", ".join(sorted(short))


def worker_environment() -> dict[str, str]:
    """Environment of the local workers: our checkout is importable, their threads don't multiply."""
    paths = [str(CHECKOUT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "TOKENIZERS_PARALLELISM": "false"}


def quiet() -> None:
    """Keep Ray's progress bars and usage note off the terminal: jobs print their own progress."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves training where others compute
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def quiet_ray_data() -> None:
    """Leave Ray Data's execution log to its file; it sets its loggers up at import, so call after that."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR)
