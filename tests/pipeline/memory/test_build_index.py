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

from infra.certificate import read_certificate, write_certificate
from infra.clip import ClipConfig
from infra.errors import ConfigError, DataError, TooManyFailuresError
from infra.storage import exists
from pipeline.memory import Memory, open_memory
from pipeline.memory.build_index import BuildIndexConfig, check, index, job, preflight, run
from pipeline.memory.build_index.duplicates import DedupConfig
from pipeline.memory.build_index.index import IndexConfig
from pipeline.memory.retrieve import RetrieveConfig
from pipeline.memory.search import SearchConfig
from pipeline.memory.search import run as search
from pipeline.memory.store import check_index
from pipeline.schema import Status
from pipeline.shards import write_shard
from tests.pipeline.clip_tables import clip_row, picture, write_clips

OFFLINE = ClipConfig(name="offline")
ROOT = Path(__file__).resolve().parents[3]


def corpus(folder: Path, numbers: range, *, bad: int = 0) -> str:
    rows = [clip_row(picture(folder / f"{n}.png", n), f"a wave number {n}") for n in numbers]
    for n in range(bad):
        (folder / f"torn-{n}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes([n]))
        rows.insert(3 * n, clip_row(folder / f"torn-{n}.png", f"torn {n}"))
    return write_clips(folder / "clips", rows, part_rows=10)


def config(out: Path, *clips: str, **values) -> BuildIndexConfig:
    values = {"clip": OFFLINE, "rows_per_unit": 5, "shard_rows": 8, "max_failed_frac": 0.3, **values}
    return BuildIndexConfig(clips=clips, out=str(out), **values)


def tiny_clip(folder: Path) -> ClipConfig:
    """A real open_clip model, random and small, as a local config and checkpoint."""
    import open_clip
    import torch

    folder.mkdir()
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)  # pyright: ignore[reportArgumentType]
    torch.save(model.state_dict(), folder / "tiny.pt")
    settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny.json").write_text(json.dumps(settings))
    return ClipConfig(name=str(folder / "tiny.json"), pretrained=str(folder / "tiny.pt"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ClipConfig:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def segments(memory: Memory) -> set[str]:
    """Of the index of the ids."""
    (index,) = memory.dataset.describe_indices()
    return {segment.uuid for segment in index.segments}


@pytest.mark.ray
def test_a_memory_is_built_once_and_grows(ray_cluster: None, tiny: ClipConfig, tmp_path: Path) -> None:
    first = corpus(tmp_path / "one", range(14), bad=2)
    out = tmp_path / "memory"
    certificate = run(config(out, first, clip=tiny))
    assert (certificate.num_in, certificate.num_out, certificate.dead) == (16, 14, {"undecodable": 2})
    rejected = pq.read_table(next(out.glob("rejected-*.parquet")))
    assert rejected["status"].to_pylist() == ["undecodable"] * 2
    assert not (out / "build").exists()

    memory = open_memory(str(out))
    assert memory.num_documents == 14 and memory.model_hash == certificate.facts["model_hash"]
    assert [shard.rows for shard in memory.shards] == [8, 6]
    files = {f: f.read_bytes() for f in (out / "shards").rglob("*.arrow")}
    files |= {f: f.read_bytes() for f in (out / "lance").rglob("*.lance") if f.is_file()}

    started_s = time.monotonic()
    assert run(config(out, first, clip=tiny)) == certificate
    assert time.monotonic() - started_s < 5

    second = corpus(tmp_path / "two", range(10, 20))
    with pytest.raises(ConfigError, match="grow=true"):
        check(config(out, first, second, clip=tiny))
    grown = run(config(out, first, second, grow=True, clip=tiny))
    assert (grown.num_in, grown.num_out) == (26, 20)
    assert grown.filtered == {"filtered_duplicate": 4}  # the same bytes and words, found in another folder
    assert grown.facts["versions"] == [certificate.facts["memory_version"], grown.facts["memory_version"]]
    assert open_memory(str(out), version=certificate.facts["memory_version"]).num_documents == 14
    memory, indexed = open_memory(str(out)), [segments(memory), segments(open_memory(str(out)))]
    assert memory.num_documents == 20 and [shard.rows for shard in memory.shards] == [8, 6, 6]
    assert len(indexed[0]) == 2 and len(indexed[1]) == 3 and indexed[0] < indexed[1]
    assert all(file.read_bytes() == data for file, data in files.items())  # nothing old is written again
    assert memory.statistics.documents == 20

    with pytest.raises(ConfigError, match=r"another build-index run.*key_frames"):
        check(config(out, first, key_frames=9, clip=tiny))


@pytest.mark.ray
def test_duplicates_are_dropped_when_asked_and_counted(
    ray_cluster: None, tiny: ClipConfig, tmp_path: Path
) -> None:
    rows = [clip_row(picture(tmp_path / f"{n}.png", n), f"wave {n}") for n in range(6)]
    again = picture(tmp_path / "again.bmp", 2)  # the same picture in another file format
    rows.append(clip_row(again, "a wave, once more"))
    clips = write_clips(tmp_path / "clips", rows)
    dedup = DedupConfig(mode="drop", min_cosine=0.999, max_phash_bits=2)
    certificate = run(config(tmp_path / "memory", clips, dedup=dedup, clip=tiny))
    assert certificate.num_out == 6
    assert certificate.filtered == {Status.FILTERED_NEAR_DUPLICATE.value: 1}
    listed = pq.read_table(tmp_path / "memory" / "duplicates.parquet").to_pylist()
    assert len(listed) == 1 and listed[0]["reason"] == Status.FILTERED_NEAR_DUPLICATE


@pytest.mark.ray
def test_too_many_failures_and_no_document_at_all_are_errors(
    ray_cluster: None, tiny: ClipConfig, tmp_path: Path
) -> None:
    clips = corpus(tmp_path / "bad", range(4), bad=3)
    with pytest.raises(TooManyFailuresError, match="3 of 7 good clips"):
        run(config(tmp_path / "memory", clips, clip=tiny))
    empty = write_clips(tmp_path / "none", [clip_row(tmp_path / "x.png", None)])
    with pytest.raises(DataError, match="no clip became a document"):
        run(config(tmp_path / "empty", empty, clip=tiny))
    assert read_certificate(tmp_path / "empty") is None


@pytest.mark.ray
def test_an_index_that_is_refused_costs_no_embedding(
    ray_cluster: None, tiny: ClipConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recall can't be known before; what was embedded is used again, with the declared floor changed."""
    clips, out = corpus(tmp_path / "corpus", range(60)), tmp_path / "memory"
    asked = {"clip": tiny, "shard_rows": 40, "rows_per_unit": 20}
    wanted = IndexConfig(min_rows=1, recall=0.99, columns=("image_embedding",))
    with monkeypatch.context() as patch:
        patch.setattr(index, "LADDER", ((1, 1),))  # one bit a dimension, nothing scored again
        with pytest.raises(DataError, match=r"recall@10 of image_embedding.*cure: index\.recall=0\."):
            run(config(out, clips, index=wanted, **asked))
        assert read_certificate(out) is None
    for file in (tmp_path / "corpus").glob("*.png"):
        file.unlink()  # who embeds again finds nothing
    certificate = run(config(out, clips, index=wanted, **asked))
    assert certificate.num_out == 60 and certificate.facts["indexes"]["image_embedding"]["recall"] >= 0.99
    assert open_memory(str(out)).num_documents == 60


@pytest.mark.ray
def test_a_finished_memory_gets_the_index_that_is_asked_for_and_stays_its_version(
    ray_cluster: None, tiny: ClipConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, out = corpus(tmp_path / "corpus", range(60)), tmp_path / "memory"
    asked = {"clip": tiny, "shard_rows": 40, "rows_per_unit": 20}
    plain = run(config(out, clips, **asked))
    assert plain.facts["indexes"] == {}
    for file in (tmp_path / "corpus").glob("*.png"):
        file.unlink()  # who embeds again finds nothing
    wanted = IndexConfig(min_rows=1, recall=0.9, columns=("image_embedding",))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "own_files", interrupt)  # the index is there, its certificate isn't
        run(config(out, clips, index=wanted, **asked))
    assert open_memory(str(out)).certificate == plain
    indexed = run(config(out, clips, index=wanted, **asked))
    assert indexed.facts["indexes"]["image_embedding"]["recall"] >= 0.9
    assert indexed.facts["memory_version"] == plain.facts["memory_version"] and indexed.num_out == 60
    assert "recall of the index" in indexed.facts["highlights"]
    memory = open_memory(str(out), version=plain.facts["memory_version"])
    check_index(memory)
    assert memory.table is not None
    assert "image_embedding_idx" in {found.name for found in memory.table.list_indices()}
    for same in (wanted, IndexConfig()):  # nothing is missing, nothing is taken away
        assert run(config(out, clips, index=same, **asked)) == memory.certificate


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_shards_of_another_size_are_refused_while_a_build_is_unfinished(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", [clip_row(picture(tmp_path / "1.png", 1), "a wave")])
    first = config(tmp_path / "memory", clips)
    preflight.begin(first, *preflight.preflight(first, reach=False))
    other = config(tmp_path / "memory", clips, shard_rows=9)
    with pytest.raises(
        ConfigError, match=r"unfinished build in other shards \(shard_rows=8\); cure: run the same"
    ):
        preflight.begin(other, *preflight.preflight(other, reach=False))


def test_bad_inputs_are_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "memory"
    with pytest.raises(ConfigError, match="no clips"):
        check(config(out))
    with pytest.raises(ConfigError, match="no certified crawl output"):
        check(config(out, str(tmp_path / "nowhere")))
    clips = write_clips(tmp_path / "clips", [clip_row(picture(tmp_path / "1.png", 1), "a wave")])
    with pytest.raises(ConfigError, match="no CLIP named 'ViT-Q'"):
        check(config(out, clips, clip=ClipConfig(name="ViT-Q")))
    with pytest.raises(ConfigError, match=r"index\.columns.*document_embedding"):
        BuildIndexConfig.load(options={"clips": [clips], "out": str(out), "index.columns": ["image"]})
    assert "up to 1 documents" in check(config(out, clips))
    assert "up to 1 documents" in check(config(out, clips, clip=ClipConfig()))  # the hub isn't asked
    monkeypatch.setattr(preflight, "free_bytes", lambda place: 50_000)
    with pytest.raises(ConfigError, match=r"1 documents of about 27,304 bytes.*has 50,000; cure: another disk"):
        check(config(out, clips))
    monkeypatch.undo()
    assert not out.exists()
    table = pq.read_table(tmp_path / "clips" / "part-00000.parquet").drop_columns(["caption"])
    certificate = read_certificate(clips)
    assert certificate is not None
    file = write_shard(f"{clips}/part-00000.parquet", table, table.schema)
    write_certificate(clips, certificate.model_copy(update={"files": [file]}))
    with pytest.raises(ConfigError, match=r"missing columns .*caption"):
        check(config(out, clips))
    foreign = tmp_path / "foreign"
    (foreign / "lance").mkdir(parents=True)
    with pytest.raises(ConfigError, match="this job didn't make"):
        check(config(foreign, write_clips(tmp_path / "again", [])))


def build_in_process(
    clips: str, out: Path | str, *, more: str | None = None, limit_bytes: int | None = None
) -> subprocess.Popen:
    """The job in a process of its own, with a Ray session of its own."""
    code = (
        "from pipeline.memory.build_index import BuildIndexConfig, run\n"
        "import json, sys\n"
        "run(BuildIndexConfig.model_validate(json.loads(sys.argv[1])))\n"
    )
    tables = [clips, more] if more else [clips]
    values = {
        "clips": tables,
        "grow": more is not None,
        "out": str(out),
        "clip": {"name": "offline"},
        "rows_per_unit": 3,
    }
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
    assert (found.facts, found.num_in, found.filtered, found.dead) == (
        *(expected.facts, expected.num_in, expected.filtered, expected.dead),
    )
    columns, numbers = ["doc_id", "text", "image", "phash", "source_uri"], range(found.num_out)
    one, other = open_memory(str(tmp_path / "whole")), open_memory(str(out))
    assert one.take(numbers, columns).equals(other.take(numbers, columns))
    for file in (tmp_path / "whole" / "shards").rglob("*.arrow"):
        assert file.read_bytes() == (out / file.relative_to(tmp_path / "whole")).read_bytes()


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
        "from pipeline.memory.build_index.shards import write_fragments\n"
        "from tests.pipeline.memory.memory_tables import documents\n"
        "rows = documents(3000, dim=384, start=100)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "write_fragments(sys.argv[1], iter(rows.to_batches()), 384)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1 and "can't write documents" in result.stderr
    assert open_memory(str(out)).num_documents == before.num_out == 6


@pytest.mark.slow
@pytest.mark.ray
def test_a_memory_in_an_object_store_is_built_grows_and_is_searched(
    s3_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own: the workers' environment must name the store before Ray starts."""
    first, second = corpus(tmp_path / "one", range(9)), corpus(tmp_path / "two", range(6, 12))
    out = "s3://memories/waves #1? 100%25"
    assert build_in_process(first, out).wait(240) == 0
    before = read_certificate(out)
    assert before is not None and before.num_out == 9
    assert build_in_process(first, out, more=second).wait(240) == 0
    grown = read_certificate(out)
    assert grown is not None and (grown.num_out, grown.filtered) == (12, {"filtered_duplicate": 3})
    assert open_memory(out, version=before.facts["memory_version"]).num_documents == 9
    retrieve, found = RetrieveConfig(retriever="bm25", k=3), "s3://memories/found #1? 100%25"
    question = SearchConfig(memory=out, text="a wave number 7", out=found, retrieve=retrieve)
    assert search(question)[0]["text"] == "a wave number 7"
    assert exists(f"{found}/search.html")
    capsys.readouterr()
