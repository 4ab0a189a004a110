"""samples.json: what is said of the sampled videos beside it, sealed by a hash of its own values."""

from collections.abc import Sequence
from typing import Any

from infra.certificate import read_sealed, write_sealed
from infra.storage import join

SAMPLES = "samples.json"


def write_samples(folder: str, entries: Sequence[dict[str, Any]], **facts: Any) -> None:
    """Write it, after the videos.

    One entry a video, in order; the facts are of all of them: the run, its weights, ...
    """
    write_sealed(join(folder, SAMPLES), {**facts, "samples": list(entries)})


def read_samples(folder: str) -> list[dict[str, Any]]:
    """The entries, in order.

    Raises:
        DataError: damaged, or of an earlier version.
        FileNotFoundError: there is none.
    """
    return read_sealed(join(folder, SAMPLES))["samples"]


def read_facts(folder: str) -> dict[str, Any]:
    """What is said of all of them; raises as `read_samples`."""
    values = read_sealed(join(folder, SAMPLES))
    return {name: value for name, value in values.items() if name != "samples"}
