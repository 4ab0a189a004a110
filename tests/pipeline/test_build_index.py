"""build-index, from the door to the certificate: nothing lost, nothing twice, however often it is stopped."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infra.clip import ClipConfig
from infra.errors import ConfigError, DataError, TooManyFailuresError
from infra.storage import read_certificate
from pipeline.build_index import BuildIndexConfig, check, run
from pipeline.dedup import DedupConfig
from pipeline.memory import open_memory
from pipeline.schema import Status
from tests.pipeline.clip_tables import clip_row, picture, write_clips

OFFLINE = ClipConfig(name="offline")
ROOT = Path(__file__).resolve().parents[2]


def corpus(folder: Path, numbers: range, *, bad: int = 0) -> str:
    rows = [clip_row(picture(folder / f"{n}.png", n), f"a wave number {n}") for n in numbers]
    for n in range(bad):
        (folder / f"torn-{n}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes([n]))
        rows.insert(3 * n, clip_row(folder / f"torn-{n}.png", f"torn {n}"))
    return write_clips(folder / "clips", rows, part_rows=10)


def config(out: Path, *clips: str, **values) -> BuildIndexConfig:
    values = {"clip": OFFLINE, "rows_per_unit": 5, "max_failed_frac": 0.3, **values}
    return BuildIndexConfig(clips=clips, out=str(out), **values)


@pytest.mark.ray
def test_a_memory_is_built_once_and_grows(ray_cluster: None, tmp_path: Path) -> None:
    first = corpus(tmp_path / "one", range(14), bad=2)
    out = tmp_path / "memory"
    certificate = run(config(out, first))
    assert (certificate.num_in, certificate.num_out, certificate.dead) == (16, 14, {"undecodable": 2})
    assert certificate.facts["indexes"]["document_embedding"]["by_query"]
    rejected = pq.read_table(next(out.glob("rejected-*.parquet")))
    assert rejected["status"].to_pylist() == ["undecodable"] * 2
    assert not (out / "build").exists()

    memory = open_memory(str(out))
    assert memory.num_documents == 14 and memory.model_hash == certificate.facts["model_hash"]
    kinds = {index.index_type for index in memory.table.list_indices()}
    assert {"FTS", "IvfFlat"} <= kinds
    assert memory.table.search("wave number 7", query_type="fts").limit(1).to_list()[0]["text"].endswith(" 7")

    started_s = time.monotonic()
    assert run(config(out, first)) == certificate
    assert time.monotonic() - started_s < 5

    second = corpus(tmp_path / "two", range(10, 20))
    with pytest.raises(ConfigError, match="grow=true"):
        check(config(out, first, second))
    grown = run(config(out, first, second, grow=True))
    assert (grown.num_in, grown.num_out) == (26, 20)
    assert grown.filtered == {"filtered_duplicate": 4}  # the same bytes and words, found in another folder
    assert grown.facts["versions"] == [certificate.facts["memory_version"], grown.facts["memory_version"]]
    assert open_memory(str(out), version=certificate.facts["memory_version"]).num_documents == 14
    assert open_memory(str(out)).num_documents == 20

    with pytest.raises(ConfigError, match=r"another build-index run.*key_frames|embed.key_frames"):
        check(config(out, first, embed={"key_frames": 9}))


@pytest.mark.ray
def test_duplicates_are_dropped_when_asked_and_counted(ray_cluster: None, tmp_path: Path) -> None:
    rows = [clip_row(picture(tmp_path / f"{n}.png", n), f"wave {n}") for n in range(6)]
    again = picture(tmp_path / "again.bmp", 2)  # the same picture in another file format
    rows.append(clip_row(again, "a wave, once more"))
    clips = write_clips(tmp_path / "clips", rows)
    dedup = DedupConfig(mode="drop", min_cosine=0.999, max_phash_bits=2)
    certificate = run(config(tmp_path / "memory", clips, dedup=dedup))
    assert certificate.num_out == 6
    assert certificate.filtered == {Status.FILTERED_NEAR_DUPLICATE.value: 1}
    listed = pq.read_table(tmp_path / "memory" / "duplicates.parquet").to_pylist()
    assert len(listed) == 1 and listed[0]["reason"] == Status.FILTERED_NEAR_DUPLICATE


@pytest.mark.ray
def test_too_many_failures_and_no_document_at_all_are_errors(ray_cluster: None, tmp_path: Path) -> None:
    clips = corpus(tmp_path / "bad", range(4), bad=3)
    with pytest.raises(TooManyFailuresError, match="3 of 7 good clips"):
        run(config(tmp_path / "memory", clips))
    empty = write_clips(tmp_path / "none", [clip_row(tmp_path / "x.png", None)])
    with pytest.raises(DataError, match="no clip became a document"):
        run(config(tmp_path / "empty", empty))
    assert read_certificate(tmp_path / "empty") is None


def test_bad_inputs_are_refused_before_anything_starts(tmp_path: Path) -> None:
    out = tmp_path / "memory"
    with pytest.raises(ConfigError, match="no clips"):
        check(config(out))
    with pytest.raises(ConfigError, match="no certified crawl output"):
        check(config(out, str(tmp_path / "nowhere")))
    clips = write_clips(tmp_path / "clips", [clip_row(picture(tmp_path / "1.png", 1), "a wave")])
    with pytest.raises(ConfigError, match="no CLIP named 'ViT-Q'"):
        check(config(out, clips, clip=ClipConfig(name="ViT-Q")))
    assert "up to 1 documents" in check(config(out, clips))
    table = pq.read_table(tmp_path / "clips" / "part-00000.parquet").drop_columns(["caption"])
    pq.write_table(table, tmp_path / "clips" / "part-00000.parquet")
    with pytest.raises(ConfigError, match=r"missing columns .*caption"):
        check(config(out, clips))
    foreign = tmp_path / "foreign"
    (foreign / "lance").mkdir(parents=True)
    with pytest.raises(ConfigError, match="this job didn't make"):
        check(config(foreign, write_clips(tmp_path / "again", [])))


def build_in_process(clips: str, out: Path, *, limit_bytes: int | None = None) -> subprocess.Popen:
    """The job in a process of its own, with a Ray session of its own."""
    code = (
        "from pipeline.build_index import BuildIndexConfig, run\n"
        "import json, sys\n"
        "run(BuildIndexConfig.model_validate(json.loads(sys.argv[1])))\n"
    )
    values = {"clips": [clips], "out": str(out), "clip": {"name": "offline"}, "rows_per_unit": 3}
    values |= {"ray": {"num_cpus": 2}, "max_failed_frac": 0.5}

    def limit() -> None:
        if limit_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(values)]
    return subprocess.Popen(
        command, cwd=ROOT, preexec_fn=limit, stderr=subprocess.PIPE, start_new_session=True, text=True
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_build_ends_in_the_same_memory(tmp_path: Path) -> None:
    clips = corpus(tmp_path / "corpus", range(40), bad=2)
    whole = build_in_process(clips, tmp_path / "whole")
    assert whole.wait(240) == 0
    out = tmp_path / "killed"
    for wait_s in (7.0, 11.0, 14.0):
        process = build_in_process(clips, out)
        time.sleep(wait_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert build_in_process(clips, out).wait(240) == 0
    expected, found = read_certificate(tmp_path / "whole"), read_certificate(out)
    assert expected is not None and found is not None
    assert found.content_hash() == expected.content_hash()
    columns = ["doc_id", "text", "image", "phash", "source_uri"]
    one, other = open_memory(str(tmp_path / "whole")), open_memory(str(out))
    assert one.columns_arrow(columns).equals(other.columns_arrow(columns))


@pytest.mark.slow
@pytest.mark.ray
def test_a_full_disk_leaves_the_last_version_readable(tmp_path: Path) -> None:
    clips = corpus(tmp_path / "corpus", range(6))
    out = tmp_path / "memory"
    assert build_in_process(clips, out).wait(240) == 0
    before = read_certificate(out)
    assert before is not None
    code = (
        "import resource, signal, sys\n"
        "from pipeline.memory.store import open_table, upsert\n"
        "from tests.pipeline.memory_tables import documents\n"
        "table, rows = open_table(sys.argv[1]), documents(3000, dim=384, start=100)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "upsert(table, rows)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1 and "the table stays at its last version" in result.stderr
    assert open_memory(str(out)).num_documents == before.num_out == 6
