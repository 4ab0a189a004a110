"""Why workers of a run went: Ray replaces them, the run's folder remembers, the driver says it.

run/restarts/<milliseconds since 1970>.json    {"position": 4000, "errors": {"0": "RuntimeError: ..."}}

The position is that of the last checkpoint, where a new worker goes on.
"""

import time
from collections.abc import Collection, Mapping
from typing import Any

from infra.storage import join, list_files, read_json, write_json
from model.training.checkpoint import committed_positions

MOST_CHARACTERS = 20_000
"""Of one error: a traceback, not a log."""


def note(run: str, errors: Mapping[int, Exception]) -> None:
    """Write down what happened, and where the run goes on."""
    whole = {str(rank): f"{cause(e)}\n\n{e}"[:MOST_CHARACTERS] for rank, e in sorted(errors.items())}
    position = max(committed_positions(run), default=0)
    write_json(join(run, "restarts", f"{int(time.time() * 1e3)}.json"), {"position": position, "errors": whole})


def cause(error: BaseException) -> str:
    """One line: the error that user code raised, or what Ray says of a worker that is gone."""
    error = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def restarts(run: str, known: Collection[str] = ()) -> dict[str, str]:
    """File -> a line to say, of what is not `known`, oldest first."""
    found = sorted(f for f in list_files(join(run, "restarts"), suffix=".json") if f not in known)
    return {file: line(read_json(file)) for file in found}


def line(record: Mapping[str, Any]) -> str:
    ranks, errors = ", ".join(record["errors"]), list(record["errors"].values())
    return (
        f"  worker{'s' if len(errors) > 1 else ''} {ranks} died: {errors[0].splitlines()[0]} "
        f"(a new one goes on from {record['position']:,} samples; more in restarts/)"
    )
