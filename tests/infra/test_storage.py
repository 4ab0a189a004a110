import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import storage
from infra.certificate import Certificate, read_certificate, require_certificate, write_certificate
from infra.claim import alone, open_job
from infra.config import Config, Incidental
from infra.errors import ConfigError, DataError


class SomeConfig(Config):
    out: Incidental[str] = "x"
    size: int = 1


def certificate(**values: object) -> Certificate:
    base = {"job": "some", "config_hash": "0", "num_in": 3, "num_out": 3}
    return Certificate.model_validate({**base, **values})


def test_written_bytes_come_back_and_leave_no_temporary_file(tmp_path: Path) -> None:
    place = storage.join(str(tmp_path), "a", "b.bin")
    storage.write_bytes(place, b"\x00\x1fdata")
    assert storage.read_bytes(place) == b"\x00\x1fdata"
    assert [Path(f).name for f in storage.list_files(str(tmp_path))] == ["b.bin"]


def stop_at(count: int) -> Any:
    """A trace function that raises Ctrl-C at the count-th line that Python runs, of any file."""
    left = count

    def trace(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0 and event == "line":
            raise KeyboardInterrupt
        return trace

    return trace


def test_a_write_that_is_stopped_at_any_line_leaves_the_old_bytes_or_the_new_and_nothing_else(
    tmp_path: Path,
) -> None:
    place, count, tracer = tmp_path / "b.bin", 0, sys.gettrace()
    place.write_bytes(b"old")
    stopped = True
    while stopped:
        count += 1
        sys.settrace(stop_at(count))
        try:
            storage.write_bytes(str(place), b"new")
            stopped = False
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracer)
        assert [path.name for path in tmp_path.iterdir()] == ["b.bin"]
        assert place.read_bytes() in ((b"old", b"new") if stopped else (b"new",))
    assert count > 10


@given(st.text(alphabet="ab./\\", min_size=1, max_size=12))
def test_join_never_leaves_its_folder(part: str) -> None:
    base = Path("/base/folder")
    try:
        joined = storage.join(str(base), part)
    except DataError:
        return
    assert Path(joined.replace("\\", "/")).resolve().is_relative_to(base)


def test_certificate_refuses_rows_that_vanish(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 rows in"):
        write_certificate(str(tmp_path), certificate(num_out=1, dead={"empty": 1}))
    assert read_certificate(str(tmp_path)) is None


def test_content_hash_ignores_when_and_how_long() -> None:
    early, late = certificate(created_at_s=1.0, wall_s=2.0), certificate(created_at_s=9.0, wall_s=1.0)
    assert early.content_hash() == late.content_hash()
    assert early.content_hash() != certificate(num_in=4, num_out=4).content_hash()


def test_uncertified_or_foreign_input_names_the_command_that_cures(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vimi-data crawl"):
        require_certificate(str(tmp_path), job="crawl", made_by="vimi-data crawl")
    write_certificate(str(tmp_path), certificate(job="other"))
    with pytest.raises(ConfigError, match="made by 'other'"):
        require_certificate(str(tmp_path), job="crawl", made_by="vimi-data crawl")


def test_same_claim_is_recognised_and_another_refused_with_the_field(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert open_job(out, job="some", config=SomeConfig(), inputs={}) is None
    assert open_job(out, job="some", config=SomeConfig(out="elsewhere"), inputs={}) is None
    with pytest.raises(ConfigError, match=r"config\.size: 1 there, 2 now"):
        open_job(out, job="some", config=SomeConfig(size=2), inputs={})
    write_certificate(out, certificate())
    found = open_job(out, job="some", config=SomeConfig(), inputs={})
    assert found is not None
    assert found.num_out == 3
    with pytest.raises(ConfigError, match="holds the output of some; cure: choose another --out"):
        open_job(out, job="other", config=SomeConfig(), inputs={})


def test_a_folder_is_held_by_one_process_and_the_other_is_told(tmp_path: Path) -> None:
    out = str(tmp_path)
    told = pytest.raises(ConfigError, match=r"^another process works on [^\n]*; cure: wait[^\n]*$")
    with alone(out), told, alone(out):
        pass
    with alone(out):
        pass


def test_the_cache_is_a_folder_that_nobody_else_can_have_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever could write there could put reversed vectors in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = storage.user_cache()
    assert cache == tmp_path / "vimi" and cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o755)
    assert storage.user_cache().stat().st_mode & 0o777 == 0o700, "nobody needs to read it"
    wrong: list[Callable[[], object]] = [lambda: cache.chmod(0o720), lambda: cache.chmod(0o702)]
    if os.getuid() == 0:
        wrong.append(lambda: os.chown(cache, 12345, 12345))
    for spoil in wrong:
        spoil()
        with pytest.raises(DataError, match="others may write there; cure: set XDG_CACHE_HOME"):
            storage.user_cache()
        os.chown(cache, os.getuid(), os.getgid())
        cache.chmod(0o700)
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a link"):
        storage.user_cache()


def test_unwritable_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="can't write to"):
        storage.check_writable(str(tmp_path / "file" / "below"))


@pytest.mark.parametrize("place", ["s3://", "s3:///", "gs://"])
def test_a_store_without_a_bucket_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="names no bucket"):
        storage.filesystem(place)


def test_s3_urls_work_against_a_real_server(s3_server: str) -> None:
    place = "s3://bucket/folder/a.json"
    storage.write_json(place, {"a": 1})
    assert storage.read_json(place) == {"a": 1}
    assert storage.list_files("s3://bucket/folder") == ["s3://bucket/folder/a.json"]
    assert storage.exists(place)
    storage.delete(place)
    assert not storage.exists(place)


ODD_NAMES = [
    "a b",
    "Funny cat #1",
    "who?",
    "who?region=x",
    "50%",
    "50%25",
    "%2e%2e",
    "a+b&c=d",
    "é",
    "#",
    "?",
    "a#/b?",
]


def test_names_of_keys_are_taken_as_they_are(s3_server: str) -> None:
    places = sorted(f"s3://bucket/in it #1?/{name}/a.bin" for name in ODD_NAMES)
    for place in places:
        storage.write_bytes(place, place.encode())
    assert storage.list_files("s3://bucket/in it #1?") == places
    assert [storage.read_bytes(place).decode() for place in places] == places
    storage.delete(places[0])
    assert [storage.exists(place) for place in places] == [False] + [True] * (len(places) - 1)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_google_key_is_taken_as_it_is_and_its_bucket_alone_read_as_an_address(name: str) -> None:
    fs, path = storage.filesystem(f"gs://anonymous@bucket/folder/{name}")
    assert (type(fs).__name__, path) == ("GcsFileSystem", f"bucket/folder/{name}")
    assert storage.filesystem("gs://anonymous@bucket")[1] == "bucket"


@pytest.mark.slow
def test_a_google_store_that_cannot_be_reached_ends_in_a_line_within_a_minute(tmp_path: Path) -> None:
    """Google's own client goes on trying for a quarter of an hour."""
    code = "from cli.data import main; main()"
    command = [sys.executable, "-c", code, "crawl", "gs://bucket/folder", "--out", str(tmp_path), "--dry-run"]
    nowhere = {"CLOUDSDK_CONFIG": str(tmp_path), "GCE_METADATA_HOST": "127.0.0.1:9", "no_proxy": "*"}
    ended = subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "the object store doesn't answer" in line and "credentials" in line
