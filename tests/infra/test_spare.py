"""A law of spares: who takes a dead actor's place finds a process that was there before, and its imports."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from infra.spare import ask_for_spare, preload, spare_env

MODULE = "wave"
"""Of the standard library, and imported by nobody else."""


class Work:
    def pid(self) -> int:
        return os.getpid()

    def has_imported(self) -> bool:
        import sys

        return MODULE in sys.modules

    def ask(self) -> bool:
        return ask_for_spare()


def spares() -> set[int]:
    """Processes of Ray that wait for work and were started for our module; a session has others as well."""
    found, wanted = set(), "=".join(spare_env([MODULE]).popitem()).encode()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            waits = (place / "cmdline").read_bytes().startswith(b"ray::IDLE")
            if waits and wanted in (place / "environ").read_bytes().split(b"\0"):
                found.add(int(place.name))
        except OSError:
            continue
    return found


def wait_for_a_spare() -> int:
    for _ in range(600):
        if found := spares():
            return found.pop()
        time.sleep(0.05)
    raise AssertionError("no spare came up")


@pytest.mark.ray
def test_a_dead_actor_is_replaced_by_its_spare(ray_cluster: None) -> None:
    import ray

    make: Any = ray.remote(Work).options(num_cpus=0, runtime_env={"env_vars": spare_env([MODULE])})
    first = make.remote()
    assert ray.get(first.ask.remote())
    spare = wait_for_a_spare()
    os.kill(ray.get(first.pid.remote()), signal.SIGKILL)
    second = make.remote()
    assert ray.get(second.pid.remote()) == spare
    assert ray.get(second.has_imported.remote())
    ray.kill(second)


def test_what_cannot_be_imported_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIMI_PRELOAD", "no.such.module,,wave")
    preload()
