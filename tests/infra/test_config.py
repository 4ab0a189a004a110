from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from infra.config import Config, Incidental, read_yaml, set_dotted
from infra.errors import ConfigError
from infra.fields import nearest, walk


class Inner(Config):
    depth: int = Field(default=2, ge=1)
    width: int = 100

    @model_validator(mode="after")
    def _flat(self) -> "Inner":
        if self.depth > self.width:
            raise ValueError(f"depth {self.depth} is more than width {self.width}")
        return self


class Outer(Config):
    name: str = "a"
    inner: Inner = Inner()


def test_yaml_then_options_then_overrides_win_in_that_order(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: from_file\ninner: {depth: 3}\n")
    loaded = Outer.load(path, options={"name": "from_option", "inner.depth": None}, overrides=["inner.depth=7"])
    assert (loaded.name, loaded.inner.depth) == ("from_option", 7)


def test_config_survives_its_own_yaml(tmp_path: Path) -> None:
    config = Outer(name="ünï: [x]", inner=Inner(depth=9))
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert Outer.load(path) == config
    assert Outer.load(path).hash() == config.hash()


@given(st.text(min_size=1), st.integers(1, 9))
def test_hash_tells_configs_apart(name: str, depth: int) -> None:
    a = Outer(name=name, inner=Inner(depth=depth))
    assert a.hash() == Outer(name=name, inner=Inner(depth=depth)).hash()
    assert a.hash() != Outer(name=name + "x", inner=Inner(depth=depth)).hash()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nmae: x", "unknown key 'nmae'"),
        ("inner: {dept: 1}", "unknown key 'inner.dept'"),
        ("inner: {depth: 0}", "inner.depth = 0"),
        ("inner: {depth: 9, width: 8}", "inner: depth 9 is more than width 8"),
        ("name: {a: 1}", "name = {'a': 1}"),
        ("- a\n- b", "holds a list"),
        ("name: [", "is not YAML"),
    ],
)
def test_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r".*") as caught:
        Outer.load(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_malformed_override_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read config"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="key=value"):
        Outer.load(overrides=["name"])
    with pytest.raises(ConfigError, match="not a group"):
        set_dotted({"a": 1}, "a.b", 2)


def test_what_says_only_where_or_how_fast_is_no_part_of_the_identity() -> None:
    class Inner(Config):
        size: int = 1
        threads: Incidental[int | None] = Field(default=None, ge=1)

    class Outer(Config):
        out: Incidental[str] = "a"
        inner: Inner = Inner()
        parts: tuple[Inner, ...] = (Inner(),)

    one = Outer()
    other = Outer(out="b", inner=Inner(threads=4), parts=(Inner(threads=2),))
    assert one.identity() == other.identity() == {"inner": {"size": 1}, "parts": [{"size": 1}]}
    assert one.hash() == other.hash() != Outer(inner=Inner(size=2)).hash()


def test_each_fault_is_a_line_with_its_cure(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("nmae: x\ninner: {depth: 0, wdth: 3}\n")
    with pytest.raises(ConfigError) as caught:
        Outer.load(path)
    unknown, depth, width = sorted(str(caught.value).splitlines(), key=lambda line: "inner" in line)
    assert unknown == f"unknown key 'nmae' in {path}; legal: the fields that --help lists; cure: write 'name'"
    assert depth == f"inner.depth = 0 in {path}; legal: greater than or equal to 1; cure: leave it out for 2"
    assert "unknown key 'inner.wdth'" in width and width.endswith("cure: write 'inner.width'")


@pytest.mark.parametrize("name", ["two\nlines", "back\rover", "clear\x1b[2J", "half \udc80"])
def test_a_fault_is_one_line_whatever_a_file_is_called(name: str) -> None:
    told = str(ConfigError(f"no clips in {name}", cure=f"crawl {name}"))
    assert told.isprintable() and told.splitlines() == [told]
    assert str(ConfigError(told)) == told


def test_an_unknown_key_names_the_nearest_of_its_group_then_of_the_whole_config() -> None:
    class Part(Config):
        path: str = ""
        depth: int = 1

    class Whole(Config):
        depth: int = 1
        inner: Inner = Inner()
        parts: tuple[Part, ...] = ()

    known = {"dpth": "depth", "inner.dept": "inner.depth", "width": "inner.width", "iner.width": "inner.width"}
    assert {key: nearest(key, Whole) for key in known} == known
    assert nearest("parts[].pth", Whole) == "parts[].path"
    assert nearest("zzz", Whole) is None


def test_what_the_command_line_said_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: fine\n")
    with pytest.raises(ConfigError, match=r"^inner.depth = 'x'; legal: .*; cure: leave it out for 2$"):
        Outer.load(path, overrides=["inner.depth=x"])


def test_a_field_set_in_a_group_leaves_the_groups_other_defaults() -> None:
    class Deep(Config):
        inner: Inner = Inner(depth=5)

    assert Deep.load(overrides=["inner.width=7"]).inner == Inner(depth=5, width=7)
    assert [field.default for field in walk(Deep)] == [Inner(depth=5), 5, 100]


def test_fields_say_what_is_legal_and_what_they_mean() -> None:
    class Part(Config):
        kind: Literal["a", "b"] = "a"
        """Which."""
        size: int | None = Field(default=None, ge=1, le=9)
        """How large;
        two lines."""

    (kind, size) = walk(Part)
    assert (kind.legal, kind.meaning, kind.default) == ("a | b", "Which.", "a")
    assert (size.legal, size.meaning) == ("int ≥ 1, ≤ 9 or null", "How large; two lines.")
