"""A spare for an actor that may die: a process that Ray has started and that has imported what the actor needs.

Ray starts an actor's process when the actor is made; interpreter, Ray, torch and a trainer's modules then
take seven to ten seconds on two cores. A spare has them behind it: its actor is there in a tenth of a second.

    preload()         what Ray calls in each new process: imports the modules that VIMI_PRELOAD names
    spare_env(...)    environment of actors whose processes preload, and whose spares nobody else takes
    ask_for_spare()   called in such an actor: one idle process like this one, on this node
    spare_after(...)  the same, for work that has lasted a while

The raylet can start idle processes for later use, but Ray 2.60 has no public function for it. So its RPC is
called here, and where that fails a restart is slower, no worse.
"""

import importlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

PRELOAD = "VIMI_PRELOAD"
HOOK = "infra.spare.preload"
KEEP_S = 30 * 24 * 3600
"""How long the raylet keeps a spare that nobody takes; it goes with its job in any case."""


def preload() -> None:
    """Import what the environment names; what can't be imported will say so where it is needed."""
    for name in filter(None, os.environ.get(PRELOAD, "").split(",")):
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 - a process that preloads less is slower, and no worse
            continue


def spare_env(modules: Iterable[str]) -> dict[str, str]:
    """Environment variables for the runtime_env of the actors that shall have spares."""
    return {PRELOAD: ",".join(modules)}


def ask_for_spare() -> bool:
    """Ask this node's raylet for an idle process with this actor's environment; whether it agreed."""
    import ray
    from google.protobuf.message import Error
    from grpc import RpcError

    try:
        _prestart(ray.get_runtime_context())
    except (ImportError, AttributeError, TypeError, ValueError, StopIteration, Error, RpcError):
        return False  # another Ray than ours, or a raylet that has no time
    return True


def _prestart(here: Any) -> None:
    """Ask for a spare of the actor whose runtime context this is."""
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.utils import get_runtime_env_info
    from ray.core.generated import common_pb2, node_manager_pb2
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    node = next(n for n in ray.nodes() if n["NodeID"] == here.get_node_id())
    environment: Any = get_runtime_env_info(here.runtime_env)
    # Raylets match environments by a hash of this very string.
    environment.serialized_runtime_env = here.get_runtime_env_string()
    messages: Any = node_manager_pb2
    request = messages.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,  # pyright: ignore[reportAttributeAccessIssue]
        job_id=bytes.fromhex(here.get_job_id()),
        runtime_env_info=environment,
        keep_alive_duration_secs=KEEP_S,
        num_workers=1,
    )
    channel: Any = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    with channel:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)


@contextmanager
def spare_after(delay_s: float | None) -> Iterator[None]:
    """Ask once the body has lasted so long, from a thread of its own; None = never."""
    timer = threading.Timer(delay_s or 0.0, ask_for_spare)
    timer.daemon = True
    if delay_s is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
