"""Exceptions of vimi and their exit codes.

    VimiError
    ├── ConfigError      the command or its config is wrong: refused before anything starts, exit code 2
    ├── DataError        a table, shard or index breaks its contract: exit code 1
    │   └── TooManyFailuresError   more bad rows than `max_failed_frac` allows
    └── TrainingError    non-finite loss, unusable checkpoint: exit code 1

A bad *row* is none of these: it leaves its job with a `status` and an `error` (pipeline/schema.py).
"""

EXIT_TERMINATED = 143
"""Of who was ended by SIGTERM, as shells have it."""


class VimiError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(VimiError, ValueError):
    """A wrong command or config; a line for each fault: what we got, what is legal, how to cure it."""

    def __init__(self, *faults: str, legal: str = "", cure: str = "") -> None:
        super().__init__("\n".join(sentence(got, legal=legal, cure=cure) for got in faults))


def sentence(got: str, *, legal: str = "", cure: str = "") -> str:
    """One fault on one line, whatever a file is called: what we got, what is legal, how to cure it."""
    parts = [got, f"legal: {legal}" if legal else "", f"cure: {cure}" if cure else ""]
    text = "; ".join(filter(None, parts))
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of what another library said, or the error's kind where it said nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class DataError(VimiError):
    """A table, shard or index that breaks its contract."""


class TooManyFailuresError(DataError):
    """More rows failed than the config's `max_failed_frac` allows."""


class TrainingError(VimiError):
    """Training can't go on: a non-finite loss, or a checkpoint that can't be used."""
