"""Configs: YAML -> one frozen pydantic model, unknown keys refused, one hash.

A job's config class lives above the job (`pipeline/clips/crawl.py: CrawlConfig`); this file only knows how to
load, override, print and hash any of them. `--set a.b=value` parses the value as YAML, so numbers,
lists and `null` mean what they mean in the file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from infra.errors import ConfigError
from infra.storage import absolute

T = TypeVar("T")
_INCIDENTAL = "incidental"
Incidental = Annotated[T, _INCIDENTAL]
"""Marks a config field that says only where or how fast a job runs: another value gives the same output."""
Location = Annotated[str, AfterValidator(absolute)]
"""A local path or a URI, made absolute when the config is read: the same place in every process."""


def _absolute_file(text: str) -> str:
    return absolute(text) if Path(text).expanduser().is_file() else text


NameOrFile = Annotated[str, AfterValidator(_absolute_file)]
"""A known name, or the path of a local file, which is made absolute like a `Location`."""


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, hashable content."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        overrides: Sequence[str] = (),
        options: dict[str, Any] | None = None,
    ) -> Self:
        """Read `path` (or start empty), then command-line `options`, then `key=value` overrides.

        Args:
            path: YAML file; None = defaults only.
            overrides: `dotted.key=yaml value`, applied last.
            options: values of named command-line options; None values are skipped. Dotted keys nest.

        Raises:
            ConfigError: unreadable file, unknown key, or illegal value; names the field.
        """
        values = read_yaml(path) if path else {}
        for key, value in (options or {}).items():
            if value is not None:
                set_dotted(values, key, value)
        for item in overrides:
            key, sep, text = item.partition("=")
            if not sep or not key:
                raise ConfigError(f"--set {item!r}", legal="key=value", cure="--set seed=1")
            set_dotted(values, key.strip(), _parse(text, item))
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(describe(error, cls, path)) from None

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def identity(self) -> dict[str, Any]:
        """The JSON values that decide what the output is: all fields but those marked `Incidental`."""
        values = self.model_dump(mode="json")
        return {
            name: _identity(getattr(self, name), values[name])
            for name, field in type(self).model_fields.items()
            if _INCIDENTAL not in field.metadata
        }

    def hash(self, *, exclude: set[str] | None = None) -> str:
        """16 hex digits of sha256 over the identity; equal configs hash equal on every machine."""
        values = {name: value for name, value in self.identity().items() if name not in (exclude or ())}
        return hashlib.sha256(canonical_json(values)).hexdigest()[:16]


def _identity(value: Any, dumped: Any) -> Any:
    """`dumped` without what is marked in the configs inside of `value`."""
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, tuple):
        return [_identity(item, below) for item, below in zip(value, dumped, strict=True)]
    return dumped


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"can't read config {path}: {error.strerror}", cure="give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"config {path} is not YAML: {first}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} holds a {type(values).__name__}", legal="a mapping of keys")
    return values


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `values["a"]["b"] = value` for the key "a.b", making the levels between."""
    *parents, last = key.split(".")
    for parent in parents:
        below = values.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError(f"key {key!r}: {parent!r} is not a group of keys")
        values = below
    values[last] = value


def describe(error: ValidationError, cls: type[BaseModel], path: str | Path | None = None) -> str:
    """One line for a failed validation: which field, what we got, what is legal."""
    where = f" in {path}" if path else ""
    parts = []
    for item in error.errors()[:4]:
        name, says = ".".join(str(part) for part in item["loc"]), item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            legal = ", ".join(_fields_at(cls, item["loc"][:-1]))
            parts.append(f"unknown key {name!r}{where}; legal: {legal}")
        elif item["type"] == "missing":
            parts.append(f"{name} is missing{where}; cure: set it in the config or by its option")
        elif isinstance(item["input"], Mapping) and item["type"] == "value_error":
            # Fields that don't go together: the message names them, and the whole group would hide it.
            parts.append(": ".join(filter(None, [name, says])) + where)
        else:
            parts.append(f"{name} = {repr(item['input'])[:80]}{where}: {says}")
    return "; ".join(parts)


def _fields_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        field = cls.model_fields.get(str(part))
        below = field.annotation if field else None
        if not (isinstance(below, type) and issubclass(below, BaseModel)):
            return ["see the documentation of this group"]
        cls = below
    return sorted(cls.model_fields)


def _parse(text: str, item: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {item!r}: the value is not YAML") from None
