"""Configs: YAML -> one frozen pydantic model, unknown keys refused, one hash.

A job's config class lives above the job (`pipeline/clips/crawl.py: CrawlConfig`); this file only knows how to
load, override, print and hash any of them. `--set a.b=value` parses the value as YAML, so numbers,
lists and `null` mean what they mean in the file.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from infra.errors import ConfigError, sentence
from infra.fields import ConfigField, nearest, walk
from infra.storage import absolute

ALLOW_IMPORTS = "VIMI_ALLOW_IMPORTS"
"""Environment variable: import paths, parted by commas, that the configs of others' outputs may name."""
T = TypeVar("T")
UNION_TAG = "kind:"
"""Begins the tags of a union of configs; they are left out of what is said of a field."""
_INCIDENTAL = "incidental"
Incidental = Annotated[T, _INCIDENTAL]
"""Marks a config field that says only where or how fast a job runs: another value gives the same output."""
Location = Annotated[str, AfterValidator(absolute)]
"""A local path or a URI, made absolute when the config is read: the same place in every process."""


def _absolute_file(text: str) -> str:
    return absolute(text) if Path(text).expanduser().is_file() else text


def _absolute_folder(text: str) -> str:
    return absolute(text) if Path(text).expanduser().is_dir() else text


NameOrFile = Annotated[str, AfterValidator(_absolute_file)]
"""A known name, or the path of a local file, which is made absolute like a `Location`."""
NameOrFolder = Annotated[str, AfterValidator(_absolute_folder)]
"""The same with a local folder."""


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, hashable; a field's docstring says what it means."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_group_defaults(cls, values: Any) -> Any:
        """Setting one field of a group leaves the others at what this config's default for the group says."""
        if not isinstance(values, Mapping):
            return values
        kept = {
            name: {**info.default.model_dump(exclude_unset=True), **values[name]}
            for name, info in cls.model_fields.items()
            if isinstance(info.default, BaseModel) and isinstance(values.get(name), Mapping)
        }
        return {**values, **kept}

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
            ConfigError: unreadable file, unknown keys, illegal values; one line for each.
        """
        values = read_yaml(path) if path else {}
        typed = {key: value for key, value in (options or {}).items() if value is not None}
        for item in overrides:
            key, sep, text = item.partition("=")
            if not sep or not key:
                raise ConfigError(f"--set {item!r}", legal="key=value", cure="--set seed=1")
            typed.pop(key.strip(), None)
            typed[key.strip()] = _parse(text, item)
        for key, value in typed.items():
            set_dotted(values, key, value)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(*describe(error, cls, path, typed)) from None

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def identity(self) -> dict[str, Any]:
        """The JSON values that decide what the output is: all fields but those marked `Incidental`."""
        values = self.model_dump(mode="json")
        return {
            name: _identity(getattr(self, name), values[name])
            for name, field in type(self).model_fields.items()
            if not is_incidental(field)
        }

    def hash(self) -> str:
        """16 hex digits of sha256 over the identity; equal configs hash equal on every machine."""
        return hashlib.sha256(canonical_json(self.identity())).hexdigest()[:16]


def is_incidental(field: FieldInfo) -> bool:
    """Is the field marked as one that can't change the output?"""
    return _INCIDENTAL in field.metadata


def _identity(value: Any, dumped: Any) -> Any:
    """`dumped` without what is marked in the configs inside of `value`."""
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, tuple):
        return [_identity(item, below) for item, below in zip(value, dumped, strict=True)]
    return dumped


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def refuse_imports(names: Iterable[str], *, of: str, own: Iterable[str] = ()) -> None:
    """Refuse what the config of a checkpoint or a table would import: that runs whatever code lies there.

    Args:
        names: import paths, `package.module:name`, in the config that came with somebody's output.
        of: where that config is from.
        own: those of the user's own config, which says that they are wanted.

    Raises:
        ConfigError: one that neither the user's config nor `VIMI_ALLOW_IMPORTS` names.
    """
    allowed = {*own, *os.environ.get(ALLOW_IMPORTS, "").split(",")}
    refused = sorted({*names} - allowed)
    if refused:
        raise ConfigError(
            f"{of} asks for {', '.join(refused)}, and importing code of others runs it",
            cure=f"if you trust it, set {ALLOW_IMPORTS}={','.join(refused)}",
        )


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


def describe(
    error: ValidationError, cls: type[BaseModel], path: str | Path | None = None, typed: Collection[str] = ()
) -> list[str]:
    """A failed validation, a line for each fault: which field, what we got, what is legal, how to cure it.

    `typed` are the dotted keys that came from the command line, not from the file at `path`.
    """
    fields = {field.name: field for field in walk(cls)}
    faults: dict[str, list[ErrorDetails]] = {}
    for item in error.errors():
        faults.setdefault(_known_part(item["loc"], fields, item["type"]), []).append(item)
    unknown = [name for name, items in faults.items() if items[0]["type"] == "extra_forbidden"]
    meant = {name: nearest(_pattern(name), cls) for name in unknown}
    lines = []
    for name, items in faults.items():
        is_typed = any(name == key or name.startswith(f"{key}.") for key in typed)
        where = f" in {path}" if path and not is_typed else ""
        if name in meant:
            cure = f"write {meant[name]!r}" if meant[name] else "leave it out"
            got = f"unknown key {name!r}{where}"
            lines.append(sentence(got, legal="the fields that --help lists", cure=cure))
        elif items[0]["type"] != "missing":
            lines.append(_illegal_value(name, items, fields.get(_pattern(name)), where))
        elif _pattern(name) not in meant.values():  # else it is there, misspelt
            cure = f"set it in the config, by its option or by --set {name}=..."
            lines.append(sentence(f"{name} is missing{where}", legal=fields[_pattern(name)].legal, cure=cure))
    return lines


def _illegal_value(name: str, items: list[ErrorDetails], field: ConfigField | None, where: str) -> str:
    """One line about a value that pydantic or a validator of ours refused."""
    value, says = items[0]["input"], [item["msg"].removeprefix("Value error, ") for item in items]
    ours = any(item["type"] == "value_error" for item in items)
    if ours and isinstance(value, Mapping):
        # Fields that don't go together: the message names them, and the whole group would hide it.
        return ": ".join(filter(None, [name, says[0]])) + where
    got = f"{name} = {repr(value)[:80]}{where}"
    if ours:
        return f"{got}: {says[0]}"
    has_default = field is not None and not field.is_required and field.group is None
    return sentence(
        got,
        legal=" or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in says)),
        cure=f"leave it out for {json.dumps(field.default, default=list)}" if field and has_default else "",
    )


def _known_part(loc: tuple[int | str, ...], fields: Mapping[str, ConfigField], kind: str) -> str:
    """The dotted name of the field that a fault is about, without the branches of its union."""
    parts = [str(part) for part in loc if not str(part).startswith(UNION_TAG)]
    if kind != "extra_forbidden":
        while parts and _pattern(".".join(parts)) not in fields and not parts[-1].isdigit():
            parts.pop()
    return ".".join(parts)


def _pattern(name: str) -> str:
    """`sources.0.kind` -> `sources[].kind`."""
    return re.sub(r"\.\d+", "[]", name)


def _parse(text: str, item: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {item!r}: the value is not YAML") from None
