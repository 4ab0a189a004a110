"""Lists the fields of a config class under dotted names, with types, defaults and docstrings."""

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}


@dataclass(frozen=True)
class ConfigField:
    """One field, as a user writes it."""

    name: str
    """Dotted: `fetch.timeout_s`; `sources[].kind` is a field of every item of a list."""
    info: FieldInfo
    default: Any
    """What it is when nobody sets it, inside the default of its group; `PydanticUndefined` = must be set."""
    group: type[BaseModel] | None
    """The config class that the field holds (or holds a list of); None = a plain value."""

    @property
    def is_required(self) -> bool:
        return self.default is PydanticUndefined

    @property
    def legal(self) -> str:
        """Type and range in words: `int ≥ 1 or null`."""
        bounds = [
            f"{sign} {value}"
            for item in self.info.metadata
            for key, sign in SIGNS.items()
            if (value := getattr(item, key, None)) is not None
        ]
        return _with_bounds(type_text(self.info.annotation), ", ".join(bounds))

    @property
    def meaning(self) -> str:
        """The field's docstring, or for a group without one the first line of its class's."""
        text = self.info.description or (self.group.__doc__ if self.group else "") or ""
        if self.info.description is None:
            text = text.strip().partition("\n")[0]
        return " ".join(text.split())


def walk(cls: type[BaseModel], at: BaseModel | None = None, prefix: str = "") -> Iterator[ConfigField]:
    """All fields of a config class, those of its groups behind them.

    `at` is an instance whose values are the defaults; None = the class's own.
    """
    for name, info in cls.model_fields.items():
        default = info.get_default(call_default_factory=True) if at is None else getattr(at, name)
        group, is_list = group_of(info.annotation)
        yield ConfigField(prefix + name, info, default, group)
        if group is not None:
            inner = default if isinstance(default, group) else None
            yield from walk(group, inner, f"{prefix}{name}{'[]' if is_list else ''}.")


def group_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """(config class in an annotation, whether it is one of a list's items)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    is_list = typing.get_origin(annotation) in (tuple, list)
    for part in typing.get_args(annotation):
        found, below = group_of(part)
        if found is not None:
            return found, is_list or below
    return None, False


def nearest(key: str, cls: type[BaseModel]) -> str | None:
    """The known dotted name that an unknown one most likely stands for: of its own group first."""
    known = sorted((field.name for field in walk(cls)), key=len)
    group, _, last = key.rpartition(".")
    own = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    everywhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    for word, names, cutoff in ((last, own, 0.7), (last, everywhere, 0.8), (key, {n: n for n in known}, 0.6)):
        found = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
        if found:
            return names[found[0]]
    return None


def type_text(annotation: Any) -> str:
    """A type as a user of YAML would say it."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(parts[0])
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(part) for part in parts)
    if origin in (tuple, list):
        inner = [type_text(part) for part in parts if part is not Ellipsis]
        return f"list of {inner[0]}".replace("group", "groups") if len(inner) == 1 else f"[{', '.join(inner)}]"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(member.value) for member in annotation)
    if origin is dict:
        return f"mapping of {type_text(parts[0])} to {type_text(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "group"
    names = {str: "text", bool: "true | false", type(None): "null", Any: "any value"}
    return names.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _with_bounds(text: str, bounds: str) -> str:
    """`int or null` and `≥ 1` -> `int ≥ 1 or null`."""
    if not bounds:
        return text
    first, sep, rest = text.partition(" or ")
    return f"{first} {bounds}{sep}{rest}"
