"""Looks up an object by its name in a table, or a user's own by its import path."""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TypeVar

T = TypeVar("T")


def named(table: Mapping[str, T], name: str) -> T:
    """The entry of this name, or what lies at `package.module:name` outside of this project.

    Workers import that module themselves, so nothing has to be registered in their process first.

    Raises:
        ValueError: no such entry, or nothing there to import.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        raise ValueError(f"{name!r}; legal: {', '.join(table)}, or package.module:name of your own")
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"nothing at {name!r}: {error}") from None
