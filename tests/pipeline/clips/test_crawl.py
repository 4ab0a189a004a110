"""Crawling real files: every row leaves with its fate, and the output is a function of the input."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.certificate import read_certificate
from infra.errors import ConfigError, TooManyFailuresError
from pipeline.clips import table as clips_table
from pipeline.clips.crawl import CrawlConfig, check, run
from pipeline.clips.sources import SourceConfig, source_from_path
from pipeline.media.store import read_media
from pipeline.schema import CLIPS

pytestmark = pytest.mark.ray


def crawl(out: Path, *sources: str | Path | SourceConfig, **settings) -> pa.Table:
    resolved = [s if isinstance(s, SourceConfig) else source_from_path(str(s)) for s in sources]
    certificate = run(CrawlConfig(sources=tuple(resolved), out=str(out), **settings))
    tables = [pq.read_table(out / file.path) for file in certificate.files]
    return pa.concat_tables(tables) if tables else CLIPS.empty_table()


def fates(table: pa.Table) -> dict[str, str]:
    """File name -> status."""
    names = [uri.rpartition("/")[2] for uri in table["source_uri"].to_pylist()]
    return dict(zip(names, table["status"].to_pylist(), strict=True))


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory, write_video, write_picture, write_sound) -> Path:
    """A folder in which every kind of trouble lies beside good files."""
    root = tmp_path_factory.mktemp("poisoned")
    for number in range(3):
        write_video(root / f"good{number}.mp4", seed=number, sound=number == 1)
        (root / f"good{number}.txt").write_text(f"film {number}")
    write_picture(root / "good.jpg", seed=5)
    (root / "good.json").write_text(json.dumps({"caption": "a picture"}))
    whole = (root / "good0.mp4").read_bytes()
    (root / "empty.mp4").write_bytes(b"")
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (root / "page.mp4").write_text("<!DOCTYPE html><html>404 Not Found</html>")
    write_sound(root / "sound.mp4")
    (root / "cut.jpg").write_bytes((root / "good.jpg").read_bytes()[:900])
    (root / "film.jpg").write_bytes(whole)
    (root / "film.txt").write_text("a film under a picture's name")
    write_video(root / "uncaptioned.mp4", seed=8)
    write_video(root / "latin1.mp4", seed=9)
    (root / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    write_video(root / "tiny.mp4", seed=10, size_px=(32, 32))
    write_video(root / "short.mp4", seed=11, num_frames=3)
    write_video(root / "frozen.mp4", frames=lambda _: np.full((96, 128, 3), (20, 90, 160), np.uint8))
    write_video(root / "late.mp4", seed=12)
    (root / "late.vtt").write_text(
        "WEBVTT\n\n00:00.000 --> 00:00.800\nfirst\n\n00:09.000 --> 00:12.000\nnever\n"
    )
    (root / "copy.mp4").write_bytes(whole)
    (root / "zcopy.mp4").write_bytes(whole)
    for name in ("tiny", "short", "frozen"):
        (root / f"{name}.txt").write_text(name)
    for name in ("copy", "zcopy"):
        (root / f"{name}.txt").write_text("film 0")
    return root


EXPECTED = {
    "good0.mp4": "filtered_duplicate",  # of copy.mp4, which comes first
    "good1.mp4": "ok",
    "good2.mp4": "ok",
    "good.jpg": "ok",
    "film.jpg": "filtered_duplicate",
    "empty.mp4": "empty",
    "cut.mp4": "undecodable",
    "noise.mp4": "undecodable",
    "page.mp4": "wrong_type",
    "sound.mp4": "no_video",
    "cut.jpg": "undecodable",
    "uncaptioned.mp4": "filtered_no_caption",
    "latin1.mp4": "bad_caption",
    "tiny.mp4": "filtered_too_small",
    "short.mp4": "filtered_too_short",
    "frozen.mp4": "filtered_static",
    "copy.mp4": "ok",
    "zcopy.mp4": "filtered_duplicate",
}


def test_every_bad_file_is_a_row_with_its_reason_and_is_accounted_for(ray_cluster, tmp_path, poisoned):
    table = crawl(tmp_path / "clips", poisoned)
    assert table.schema.equals(CLIPS)
    found = fates(table)
    late = found.pop("late.mp4")
    film = found.pop("film.jpg")
    assert found == {name: status for name, status in EXPECTED.items() if name != "film.jpg"}
    assert (late, film) == ("bad_range", "ok")  # one good row, one range past the end; named wrongly
    rows = table.to_pylist()
    assert all(row["error"] for row in rows if row["status"] != "ok")
    assert {row["media"] for row in rows if row["source_uri"].endswith("film.jpg")} == {"video"}
    certificate = read_certificate(str(tmp_path / "clips"), job="crawl")
    counts = Counter(table["status"].to_pylist())
    assert certificate is not None
    assert certificate.num_in == len(table) == counts.total()
    assert certificate.num_out == counts["ok"]
    assert {**certificate.filtered, **certificate.dead} == {s: n for s, n in counts.items() if s != "ok"}


def test_output_bytes_do_not_depend_on_the_number_of_workers(ray_cluster, tmp_path, poisoned, monkeypatch):
    monkeypatch.setattr(clips_table, "ROWS_PER_PART", 7)
    outputs = []
    for workers in (1, 2):
        out = tmp_path / f"clips{workers}"
        crawl(out, poisoned, num_workers=workers)
        outputs.append({p.name: p.read_bytes() for p in sorted(out.glob("part-*.parquet"))})
    assert len(outputs[0]) == 3
    assert outputs[0] == outputs[1]


def test_finished_crawl_is_recognised_and_changed_corpus_is_refused(ray_cluster, tmp_path, write_video):
    write_video(tmp_path / "in" / "a.mp4")
    (tmp_path / "in" / "a.txt").write_text("a")
    crawl(tmp_path / "clips", tmp_path / "in")
    before = (tmp_path / "clips" / "certificate.json").read_bytes()
    crawl(tmp_path / "clips", tmp_path / "in")
    assert (tmp_path / "clips" / "certificate.json").read_bytes() == before
    (tmp_path / "in" / "a.txt").write_text("another caption")
    with pytest.raises(ConfigError, match=r"another crawl run.*choose another --out"):
        crawl(tmp_path / "clips", tmp_path / "in")


def test_ranges_of_one_video_are_clips_of_one_unit(ray_cluster, tmp_path, write_video):
    write_video(tmp_path / "a.mp4", num_frames=90)
    lines = [
        "video,start,end,caption",
        "a.mp4,0,1,one",
        "a.mp4,1.0,2.5,two",
        "a.mp4,nan,2,three",
        "a.mp4,2,1,four",
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    rows = crawl(tmp_path / "clips", tmp_path / "list.csv").to_pylist()
    assert [row["caption"] for row in rows] == ["one", "two", "three", "four"]
    assert [row["status"] for row in rows] == ["ok", "ok", "bad_range", "bad_range"]
    assert [(row["start_s"], row["end_s"], row["num_frames"]) for row in rows[:2]] == [(0, 1, 30), (1, 2.5, 45)]
    assert len({row["clip_id"] for row in rows[:2]}) == 2
    certificate = read_certificate(str(tmp_path / "clips"))
    assert certificate is not None
    assert certificate.facts["units"] == 1


def test_pictures_inside_parquet_are_referenced_not_copied(ray_cluster, tmp_path, write_picture):
    pictures = [write_picture(tmp_path / f"{n}.jpg", seed=n).read_bytes() for n in range(5)]
    table = pa.table({"id": list("abcde"), "caption": list("ABCDE"), "image": [*pictures[:4], b""]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    rows = crawl(tmp_path / "clips", tmp_path / "t.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["empty"]
    assert [read_media(row["local_uri"]) for row in rows[:4]] == pictures[:4]
    assert {(row["media"], row["width_px"], row["height_px"]) for row in rows[:4]} == {("image", 128, 96)}
    assert not list((tmp_path / "clips").rglob("*.jpg"))


def test_near_duplicates_are_found_across_parents_when_asked(ray_cluster, tmp_path, write_video):
    write_video(tmp_path / "in" / "a.mp4", seed=1)
    write_video(tmp_path / "in" / "b.mp4", seed=1, options={"crf": "33"})
    write_video(tmp_path / "in" / "c.mp4", seed=4)
    for name in "abc":
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    assert set(fates(crawl(tmp_path / "kept", tmp_path / "in")).values()) == {"ok"}
    table = crawl(tmp_path / "clips", tmp_path / "in", filters={"near_duplicate_bits": 4})
    assert fates(table) == {"a.mp4": "ok", "b.mp4": "filtered_near_duplicate", "c.mp4": "ok"}


def test_too_many_failures_fail_the_job_with_the_reasons_counted(ray_cluster, tmp_path, poisoned):
    with pytest.raises(TooManyFailuresError, match=r"of 20 rows failed \(.*undecodable 3"):
        crawl(tmp_path / "clips", poisoned, max_failed_frac=0.1)
    assert read_certificate(str(tmp_path / "clips")) is None
    assert len(crawl(tmp_path / "clips", poisoned, max_failed_frac=0.9)) == 20


def test_empty_and_absent_corpora_are_refused_at_the_door(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(ConfigError, match="cure:"):
            check(CrawlConfig(sources=(source_from_path(str(path)),), out=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="no sources"):
        check(CrawlConfig(sources=(), out=str(tmp_path / "out")))
