"""Runs commands as their console scripts do, one after the other, in this process and one Ray session."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cli import data, train
from cli.errors import EXIT_STOPPED
from infra.cluster import RayConfig, ray_session
from infra.errors import EXIT_TERMINATED

PROGRAMS = {"vimi-data": data.main, "vimi-train": train.main}
Step = tuple[Path, str]
"""(folder in which it is typed, command)."""


def run_steps(steps: Sequence[Step], *, name: str) -> None:
    """Run commands one after the other, each in its folder, in this process and one Ray session.

    Raises:
        SystemExit: with the exit code of the command that failed.
        KeyboardInterrupt: one was stopped.
    """
    with ray_session(RayConfig()):
        for number, (folder, step) in enumerate(steps, start=1):
            folder.mkdir(parents=True, exist_ok=True)
            os.chdir(folder)
            print(f"\n[{number}/{len(steps)}] $ {step}", flush=True)
            run_step(step, name=name)


def run_step(step: str, *, name: str) -> None:
    """Run one command as its console script does, in this process and its Ray session, if it has one."""
    program, *arguments = shlex.split(step)
    sys.argv = [program, *arguments]
    try:
        PROGRAMS[program]()
    except SystemExit as end:
        if end.code == EXIT_STOPPED:
            raise KeyboardInterrupt from None
        if end.code and end.code != EXIT_TERMINATED:
            print(f"{name}: `{step}` ended with exit code {end.code}", file=sys.stderr)
        if end.code:
            raise
