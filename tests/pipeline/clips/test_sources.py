"""Readers of corpora: what each kind lists, and that a hostile or broken list costs rows, not runs."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError, DataError
from infra.storage import write_bytes
from pipeline.clips import crawl, sources
from pipeline.clips.filters import FilterConfig
from pipeline.clips.parent import inspect_parent
from pipeline.clips.sources import Item, Reader, SourceConfig, base, open_source, read_items, source_from_path
from pipeline.clips.sources.captions import clean_caption, parse_time, read_sidecar
from pipeline.media.clip import read_frames
from pipeline.media.frames import probe
from pipeline.media.store import open_media, read_media
from pipeline.schema import CLIPS


def read(source: SourceConfig | Path | str) -> list[Item]:
    config = source if isinstance(source, SourceConfig) else source_from_path(str(source))
    return list(read_items(config, open_source(config)))


def test_folder_takes_captions_from_any_sidecar(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.webm", "d.jpg", "e.mp4", "sub/f.mp4", ".hidden/g.mp4", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text("  two\n lines ")
    (tmp_path / "b.json").write_text(json.dumps({"clips": [{"start_s": 1, "end_s": 2, "caption": "one"}]}))
    (tmp_path / "c.vtt").write_text("WEBVTT\n\n1\n00:01.500 --> 00:02.500 align:start\n<i>hello</i>\nthere\n")
    (tmp_path / "d.jpg.txt").write_text("a picture")
    (tmp_path / "sub/f.srt").write_text("1\r\n00:00:01,000 --> 00:00:02,000\r\nhi\r\n\r\n")
    found = {item.uri.removeprefix(f"{tmp_path}/"): item for item in read(tmp_path)}
    cuts = {name: [(c.caption, c.start_s, c.end_s) for c in item.cuts] for name, item in found.items()}
    assert cuts == {
        "a.mp4": [("two lines", None, None)],
        "b.mp4": [("one", 1.0, 2.0)],
        "c.webm": [("hello there", 1.5, 2.5)],
        "d.jpg": [("a picture", None, None)],
        "e.mp4": [(None, None, None)],
        "sub/f.mp4": [("hi", 1.0, 2.0)],
    }
    assert found["d.jpg"].media == "image"


@given(st.binary(max_size=80), st.sampled_from(["a.txt", "a.json", "a.vtt", "a.srt"]))
def test_no_sidecar_can_crash_a_reader(data, name):
    cuts = read_sidecar(name, data)
    assert cuts
    assert all(cut.caption or cut.status or cut.caption is None for cut in cuts)


def test_panda70m_lists_of_ranges_are_clips_of_one_parent(tmp_path):
    text = (
        "videoID,url,timestamp,caption\n"
        "x,https://example.org/x.mp4,\"[['0:00:01.500', '0:00:04.000'], ['0:01:00.0', '1:00:00']]\","
        '"[\'A dog.\', \'A ""cat"".\']"\n'
        "y,https://example.org/y.mp4,\"[['0:00:01', '0:00:04']]\",\"['one', 'too many']\"\n"
    )
    (tmp_path / "panda.csv").write_text(text)
    first, second = read(tmp_path / "panda.csv")
    assert [(c.caption, c.start_s, c.end_s) for c in first.cuts] == [
        ("A dog.", 1.5, 4.0),
        ('A "cat".', 60.0, 3600.0),
    ]
    assert [(c.status, c.error) for c in second.cuts] == [("bad_row", "1 ranges but 2 captions")]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_of_all_kinds_read_alike(tmp_path, kind):
    rows = [
        {"film": "a.mp4", "words": "one", "from": 0.0, "to": 1.5, "split": "train"},
        {"film": "a.mp4", "words": "two", "from": 1.5, "to": 3.0, "split": "train"},
        {"film": "sub/b.mp4", "words": None, "from": None, "to": None, "split": "val"},
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        lines = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]))
    columns = {"uri": "film", "caption": "words", "start_s": "from", "end_s": "to"}
    a, b = read(SourceConfig(kind="manifest", path=str(path), columns=columns, licence="CC0", name="films"))
    assert (a.uri, a.split, a.licence, a.source_name) == (f"{tmp_path}/a.mp4", "train", "CC0", "films")
    assert [(c.caption, c.start_s, c.end_s) for c in a.cuts] == [("one", 0.0, 1.5), ("two", 1.5, 3.0)]
    assert [(c.caption, c.start_s) for c in b.cuts] == [(None, None)]


def test_a_damaged_table_is_refused_in_one_line(tmp_path):
    rows = [{"video": f"{n}.mp4", "caption": hashlib.sha256(bytes([n])).hexdigest() * 9} for n in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=20)
    text = "\n".join(json.dumps(row) for row in rows).encode()
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(text))
    lines = "\n".join(f"https://example.org/{row['caption']}" for row in rows).encode()
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(lines))
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        assert sum(1 for _ in read(path)) == 200
        middle = len(data) // 2
        for torn in (data[:middle], data[:middle] + bytes(64) + data[middle + 64 :], b"\x1f\x8b" + bytes(9)):
            path.write_bytes(torn)
            with pytest.raises((ConfigError, DataError), match="can't be read") as caught:
                read(path)
            assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_bad_lines_are_rows_and_good_lines_survive(tmp_path):
    lines = [
        b'{"video": "a.mp4", "caption": "good"}',
        b"{ not json",
        b"[1, 2]",
        b'{"caption": "no video"}',
        b'{"video": 7, "caption": "a number"}',
        b'{"video": "b.mp4", "caption": 7}',
        b'{"video": "c.mp4", "caption": "caf\xe9"}',
        b'{"video": "d.mp4", "caption": "x", "start": "soon"}',
        b'{"video": "e.mp4", "caption": "x", "start": NaN, "end": 2}',
        b'{"video": "f.mp4", "caption": "last"}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    fates = [item.status or item.cuts[0].status or "ok" for item in read(tmp_path / "t.jsonl")]
    assert fates == [
        *("ok", "bad_row", "bad_row", "bad_row", "bad_row", "bad_caption", "bad_caption"),
        *("bad_range", "bad_range", "ok"),
    ]


def test_a_caption_in_brackets_is_a_caption(tmp_path):
    (tmp_path / "list.jsonl").write_text(json.dumps({"video": "a.mp4", "caption": "[Music] A man sings."}))
    (item,) = read(tmp_path / "list.jsonl")
    assert [(cut.caption, cut.status) for cut in item.cuts] == [("[Music] A man sings.", None)]


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "a/../../b.mp4", "file:///etc/passwd", "~/x"])
def test_a_manifest_cannot_climb_out_of_its_folder(tmp_path, name):
    (tmp_path / "t.jsonl").write_text(json.dumps({"video": name, "caption": "x"}))
    (item,) = read(tmp_path / "t.jsonl")
    assert item.status == "refused"
    (item,) = read(SourceConfig(kind="manifest", path=str(tmp_path / "t.jsonl"), allow_outside_root=True))
    assert item.status is None


def test_an_absolute_path_inside_the_folder_is_fine(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"video": f"{tmp_path}/a.mp4", "caption": "x"}))
    (item,) = read(tmp_path / "t.jsonl")
    assert (item.uri, item.status) == (f"{tmp_path}/a.mp4", None)


def test_a_table_without_a_media_column_is_refused_with_its_columns(tmp_path):
    (tmp_path / "t.csv").write_text("name,words\nx,y\n")
    with pytest.raises(ConfigError, match=r"legal: its columns: name, words; cure: map it"):
        read(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="film"):
        read(SourceConfig(kind="manifest", path=str(tmp_path / "t.csv"), columns={"uri": "film"}))


def test_a_folder_with_a_listing_is_read_through_it(tmp_path):
    (tmp_path / "captions.jsonl").write_text(json.dumps({"clip": "clips/a.mp4", "caption": "x"}))
    config = source_from_path(str(tmp_path))
    assert (config.kind, config.name) == ("manifest", tmp_path.name)


@given(st.floats(0, 1e6), st.integers(0, 99), st.integers(0, 59), st.floats(0, 59.99))
def test_times_parse_as_numbers_and_as_clocks(number, hours, minutes, seconds):
    assert parse_time(number) == number == parse_time(repr(number))
    clock = f"{hours}:{minutes:02}:{seconds:06.3f}"
    assert parse_time(clock) == pytest.approx(hours * 3600 + minutes * 60 + seconds, abs=1e-3)
    assert parse_time(clock.replace(".", ",")) == parse_time(clock)


@pytest.mark.parametrize("value", ["nan", float("nan"), "inf", "-", "1:2:3:4", [1], object()])
def test_what_is_no_time_is_an_error(value):
    with pytest.raises(ValueError, match="time"):
        parse_time(value)


@given(st.text())
def test_captions_are_clean_text_or_say_why_not(text):
    caption, error = clean_caption(text)
    assert caption is None or caption == " ".join(caption.split())
    assert (caption is None) or error is None


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_samples_are_ranges_of_their_archive(tmp_path):
    members = {
        "000.jpg": b"\xff\xd8\xff picture",
        "000.txt": b"a picture",
        "000.json": b'{"caption": "not this one", "width": 3}',
        "001.mp4": b"film",
        "001.json": b'{"clips": [{"start_s": 1, "end_s": 2, "caption": "one"}]}',
        "../../etc/002.png": b"png",
        "003.txt": b"no media",
    }
    path = write_tar(tmp_path / "000.tar", members)
    items = read(path)
    assert [read_media(item.uri) for item in items] == [b"\xff\xd8\xff picture", b"film", b"png"]
    assert [item.cuts[0].caption for item in items] == ["a picture", "one", None]
    assert items[1].cuts[0].start_s == 1
    write_tar(tmp_path / "001.tar", {"a.jpg": b"x"})
    assert len(read(tmp_path)) == len(read(f"{tmp_path}/{{000..001}}.tar")) == 4


def test_a_broken_archive_is_a_row(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {f"{n}.jpg": b"x" * 2000 for n in range(5)}).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:5000])
    (tmp_path / "b.tar").write_bytes(b"not a tar at all" * 90)
    fates = [item.status for item in read(tmp_path)]
    assert fates[-1] == "bad_row"
    assert fates.count(None) >= 1


def test_url_lists_take_captions_after_a_tab(tmp_path):
    lines = [
        "# films",
        "http://a.org/x.mp4\ta film",
        "",
        "https://a.org/y",
        "not an address",
        "ftp://a.org/z.jpg",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    items = read(tmp_path / "list.txt")
    assert [(i.media, i.cuts[0].caption, i.status) for i in items] == [
        ("video", "a film", None),
        ("auto", None, None),
        ("auto", None, "bad_row"),
        ("auto", None, "bad_row"),
    ]


def test_corpora_on_an_object_store_read_like_those_on_disk(s3_server, tmp_path, write_video, write_picture):
    film = write_video(tmp_path / "a.mp4").read_bytes()
    picture = write_picture(tmp_path / "b.jpg").read_bytes()
    write_tar(tmp_path / "t.tar", {"000.jpg": picture, "000.txt": b"a picture"})
    pq.write_table(pa.table({"image": [picture], "caption": ["a cell"]}), tmp_path / "t.parquet")
    folder, name = "s3://corpus/in 100% #1?", "Funny cat #2, 50%25?"
    files = {f"{name}.mp4": film, f"{name}.txt": b"a film"}
    files |= {f"t/{f}": (tmp_path / f).read_bytes() for f in ("t.tar", "t.parquet")}
    for file, data in files.items():
        write_bytes(f"{folder}/{file}", data)
    items = [i for i in read(folder) if i.uri == f"{folder}/{name}.mp4"]
    items += [*read(f"{folder}/t/t.tar"), *read(f"{folder}/t/t.parquet")]
    settings = ("whole", FilterConfig())
    rows = [row for i in items for row in inspect_parent(i.to_json(), {"local_uri": i.uri}, *settings)]
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert [row["caption"] for row in rows] == ["a film", "a picture", "a cell"]
    assert rows[0]["source_sha256"] == hashlib.sha256(film).hexdigest()


NAMES = [
    *("Dr. Who #2.mp4", "Funny cat #shorts.mp4", "What is this? part 1.mp4", "a b%20c.mp4", "x #file.mp4"),
    *("x#row=1&column=a.mp4", "x.parquet#row=0&column=image.mp4", "x.tar#offset=3&size=9.mp4"),
]


@pytest.mark.parametrize("kind", ["folder", "manifest"])
def test_a_local_name_with_signs_of_an_address_is_a_name(tmp_path, write_video, kind):
    film = write_video(tmp_path / "film.mp4").read_bytes()
    root = tmp_path / "corpus #1&column=x"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(film)
    source = SourceConfig(kind="folder", path=str(root))
    if kind == "manifest":
        (root / "list.jsonl").write_text("\n".join(json.dumps({"video": name}) for name in NAMES))
        source = SourceConfig(kind="manifest", path=f"{root}/list.jsonl")
    items = read(source)
    assert len(items) == len(NAMES)
    for item in items:
        (row,) = inspect_parent(
            item.to_json(), {"local_uri": item.uri}, "whole", FilterConfig(require_caption=False)
        )
        assert (row["status"], read_media(row["local_uri"])) == ("ok", film)
        assert probe(open_media(row["local_uri"])).num_frames == row["num_frames"]
        assert len(read_frames({**row, "target": None}, (0.5,)).frames) == 1


def test_pieces_of_files_in_folders_with_odd_names_are_found(tmp_path, write_picture):
    root = tmp_path / "x#row=1&column=a"
    picture = write_picture(root / "p.jpg").read_bytes()
    pq.write_table(pa.table({"image #1": [picture]}), root / "t.parquet")
    write_tar(root / "t.tar", {"0.jpg": picture})
    sources = [
        SourceConfig(kind="tar", path=f"{root}/t.tar"),
        SourceConfig(kind="manifest", path=f"{root}/t.parquet", columns={"uri": "image #1"}),
    ]
    assert [read_media(item.uri) for source in sources for item in read(source)] == [picture] * 2


def test_links_are_followed_but_no_folder_is_visited_twice(tmp_path):
    root, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for name in ("a.mp4", "sub/b.mp4", "sub/deep/c.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    elsewhere.mkdir()
    (elsewhere / "d.mp4").write_bytes(b"x")
    for link, target in {
        **{"up": "..", "sub/self": root, "sub/deep/up": "..", "0": root / "sub", "far": elsewhere},
        **{"far2": elsewhere, "linked.mp4": elsewhere / "d.mp4", "nowhere.mp4": root / "gone"},
        **{"ring.mp4": "ring.mp4", "ring.txt": "ring.txt", "rings": "rings"},
    }.items():
        (root / link).symlink_to(target)
    found = {item.uri.removeprefix(f"{root}/") for item in read(root)}
    assert found == {
        *("a.mp4", "sub/b.mp4", "sub/deep/c.mp4", "far/d.mp4", "linked.mp4", "nowhere.mp4", "ring.mp4"),
    }
    for name, status in (("nowhere.mp4", "not_found"), ("ring.mp4", "bad_row")):
        lost = Item(f"{root}/{name}", "video")
        (row,) = inspect_parent(lost.to_json(), {"local_uri": lost.uri}, "whole", FilterConfig())
        assert row["status"] == status, row["error"]


def test_names_that_are_not_utf8_and_sidecars_that_cannot_be_read_are_rows(tmp_path):
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mp4")).write_bytes(b"x")
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_bytes(b"x")
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    a, cafe = read(tmp_path)
    assert (a.cuts[0].status, cafe.status) == ("bad_caption", "bad_row")
    cafe.uri.encode()


DEEP = "[" * 100_000
ODD_ROWS = [
    {"video": "a.mp4", "start": 10**400, "end": 2},
    {"video": "a.mp4", "caption": DEEP},
    {"video": "a.mp4", "timestamps": DEEP, "caption": "x"},
    {"video": "a.mp4", "caption": "x", "split": "\ud800", "licence": ["\ud800"]},
    {"video": "a.mp4", "caption": "x", "start": "9" * 4000 + ":00:00", "end": 2},
    {"video": "a.mp4", "caption": "x" * 100_000},
    {"video": "ftp://me:secret@host/a.mp4", "caption": "x"},
    {"": 5},
]


@pytest.mark.parametrize("row", ODD_ROWS, ids=lambda row: repr(row)[:40])
def test_odd_values_of_a_table_are_rows(tmp_path, row):
    (tmp_path / "t.jsonl").write_text(json.dumps({"video": "a.mp4", "caption": "x"}) + "\n" + json.dumps(row))
    items = read(tmp_path / "t.jsonl")
    rows = [
        row for i in items for row in inspect_parent(i.to_json(), {"local_uri": i.uri}, "whole", FilterConfig())
    ]
    table = pa.Table.from_pylist(rows, schema=CLIPS.remove(0).remove(0))
    assert "secret" not in repr(table.to_pylist())


def test_a_column_without_a_name_is_one_that_is_not_asked_for(tmp_path):
    (tmp_path / "pandas.csv").write_text(",video,caption\n0,a.mp4,one\n1,b.mp4,two\n")
    assert [item.cuts[0].caption for item in read(tmp_path / "pandas.csv")] == ["one", "two"]


def test_a_caption_longer_than_any_is_a_row(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("word " * 20_000)
    (item,) = read(tmp_path)
    assert (item.cuts[0].status, item.cuts[0].error) == (
        "bad_caption",
        "caption of 99,999 characters, more than 10,000",
    )


class NumberReader(Reader):
    """A toy corpus: `numbers:3` is three pictures."""

    def __init__(self, config: SourceConfig) -> None:
        self.count = int(config.path.removeprefix("numbers:"))

    @classmethod
    def recognise(cls, path: str) -> SourceConfig | None:
        return SourceConfig(kind="numbers", path=path) if path.startswith("numbers:") else None

    def items(self) -> Iterator[Item]:
        return (Item(f"/{number}.jpg", "image") for number in range(self.count))

    def fingerprint(self) -> str:
        return str(self.count)


def test_a_reader_is_added_from_outside(monkeypatch):
    monkeypatch.setattr(base, "READERS", dict(base.READERS))
    monkeypatch.setattr(sources, "READERS", base.READERS)
    with pytest.raises(ValueError, match="legal: folder, tar, manifest, urls, page"):
        SourceConfig(kind="numbers", path="numbers:3")
    sources.register("numbers", NumberReader)
    assert [item.uri for item in read("numbers:3")] == ["/0.jpg", "/1.jpg", "/2.jpg"]
    assert len(crawl.check(crawl.CrawlConfig(sources=(source_from_path("numbers:2"),), out="out"))) == 1
    assert source_from_path("http://a.org/list.csv").kind == "page"
