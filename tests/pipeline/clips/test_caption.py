"""Laws of captioning: words for clips that lack them, the old ones kept, the writer named, each counted."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.certificate import read_certificate
from infra.clip import ClipConfig
from infra.cluster import RayConfig
from infra.errors import ConfigError
from pipeline.clips import caption, crawl, redrive
from pipeline.clips.caption import CaptionConfig, Worker, check, plan_units, wants_caption
from pipeline.clips.captioner import Captioner, clean
from pipeline.clips.crawl import CrawlConfig
from pipeline.clips.filters import FilterConfig
from pipeline.clips.redrive import crawl_config
from pipeline.clips.sources import source_from_path
from pipeline.journal import JournalWriter
from pipeline.schema import CLIPS, Status, check_table, clip_id
from tests.infra.tiny_clips import MODELS, save_tiny
from tests.model.prompt import tiny_mllms

RAY = RayConfig(num_cpus=2)
GOOD = "A good caption of more than three words"


def save(family: str, folder: Path) -> str:
    for part in tiny_mllms.made(family):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def clips(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, write_video, write_picture) -> str:
    """Silent, frozen and silent, poor, good; a picture; a file that is no video; one whose media go."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, name in enumerate(("silent", "poor", "good", "lost")):
        write_video(folder / "in" / f"{name}.mp4", seed=number)
    write_video(folder / "in" / "still.mp4", frames=lambda _: np.full((96, 128, 3), 90, np.uint8))
    write_picture(folder / "in" / "picture.jpg", seed=9)
    (folder / "in" / "torn.mp4").write_bytes(b"\0\0\0\x18ftypisom torn")
    words = {"poor": "dog", "good": GOOD, "torn": "torn", "lost": "x"}
    for name, text in words.items():
        (folder / "in" / f"{name}.txt").write_text(text)
    out = str(folder / "clips")
    crawl.run(CrawlConfig(sources=(source_from_path(str(folder / "in")),), out=out, ray=RAY))
    (folder / "in" / "lost.mp4").unlink()
    return out


def config(clips: str, model: str, out: Path, **values: Any) -> CaptionConfig:
    values = {"which": "poor", "clip": None, "max_tokens": 8, "unit_rows": 2, "batch_size": 2, **values}
    return CaptionConfig(clips=clips, model=model, out=str(out), ray=RAY, num_workers=2, **values)


def rows_of(out: str | Path) -> dict[str, dict[str, Any]]:
    certificate = read_certificate(str(out), job="crawl")
    assert certificate is not None
    table = pa.concat_tables([pq.read_table(Path(out) / file.path) for file in certificate.files])
    check_table(table.schema, CLIPS, str(out))
    return {Path(row["source_uri"]).stem: row for row in table.to_pylist()}


def folder_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.parquet"))}


@pytest.fixture(scope="module")
def made(clips: str, model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("captioned") / "whole"
    caption.run(config(clips, model, out))
    return out


@pytest.mark.parametrize("family", tiny_mllms.FAMILIES)
def test_every_family_answers_in_a_line_whatever_the_batch(family: str, tmp_path: Path):
    captioner = Captioner(save(family, tmp_path))
    random = np.random.default_rng(0)
    pictures = [list(random.integers(0, 256, (n, 48, 64, 3), dtype=np.uint8)) for n in (2, 2, 1)]
    asked = ["Describe this.", "Describe this video that shows a dog.", "What?"]
    together = captioner.answer(pictures, asked, max_tokens=6)
    alone = [captioner.answer([p], [q], max_tokens=6)[0] for p, q in zip(pictures, asked, strict=True)]
    assert len(together) == 3 and all(words == clean(words) for words in together)
    assert together[:2] == alone[:2]
    assert captioner.answer([], [], max_tokens=6) == []


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_a_frame_is_seen_whole_and_not_in_tiles(family: str, tmp_path: Path):
    captioner = Captioner(save(family, tmp_path))
    frames = list(np.random.default_rng(0).integers(0, 256, (2, 252, 448, 3), dtype=np.uint8))
    inputs = captioner._inputs([frames], ["What?"])
    assert inputs["pixel_values"].shape[:2] == (1, 2)  # of two frames


def test_a_clip_that_breaks_the_filters_costs_its_row_and_not_the_job(write_video, tmp_path: Path):
    video = write_video(tmp_path / "no span.mp4")
    row = {**dict.fromkeys(CLIPS.names), "media": "video", "source_uri": str(video), "caption": GOOD}
    worker = Worker(config("clips", "model", tmp_path / "out"), FilterConfig(), "m")
    judged = worker._judge(row)
    worker.close()
    assert judged["status"] == Status.UNDECODABLE and judged["error"].startswith("TypeError: ")
    assert judged["caption"] == GOOD


@pytest.mark.ray
def test_silent_and_poor_clips_get_words_and_keep_their_own(clips: str, model: str, made: Path):
    before, after = rows_of(clips), rows_of(made)
    assert [*after] == [*before]
    assert after["good"] == before["good"] and after["torn"] == before["torn"]
    for name in ("silent", "poor", "picture"):
        row = after[name]
        assert row["status"] == Status.OK and row["caption"] == clean(row["caption"]) != before[name]["caption"]
        assert row["caption_found"] == before[name]["caption"]
        assert row["caption_model"].startswith(f"{Path(model).name}@")
        source = (row["source_sha256"], row["start_s"], row["end_s"])
        assert row["clip_id"] == clip_id(*source, row["caption"]) != before[name]["clip_id"]
        assert row["phash"] is not None  # the filters that a silent clip had not met


@pytest.mark.ray
def test_every_row_is_accounted_for_and_so_is_every_caption(clips: str, made: Path):
    certificate, source = read_certificate(str(made)), read_certificate(clips)
    assert certificate is not None and source is not None
    assert certificate.num_in == source.num_in == 7
    assert rows_of(made)["still"]["status"] == Status.FILTERED_STATIC  # judged, now that it has words
    assert rows_of(made)["lost"]["status"] == Status.NOT_FOUND
    assert certificate.facts["captions"] == {"asked": 5, "captioned": 4, "unreadable": 1}


@pytest.mark.ray
def test_a_killed_job_goes_on_to_the_same_bytes_with_any_number_of_workers(
    clips: str, model: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed with a receipt written and another half written."""
    out = tmp_path / "again"
    own = config(clips, model, out).model_copy(update={"num_workers": 1})

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(caption, "run_networks", killed)
        caption.run(own)
    source = read_certificate(clips)
    assert source is not None
    first, second, *_ = plan_units(own, source)
    worker = Worker(
        own, check(own), next(r["caption_model"] for r in rows_of(made).values() if r["caption_model"])
    )
    writer = JournalWriter(f"{out}/journal", "killed")
    writer.append(first.id, worker(first.payload))
    writer.append(second.id, worker(second.payload))
    writer.close()
    worker.close()
    journal = next((out / "journal").rglob("*.jsonl"))
    os.truncate(journal, journal.stat().st_size - 9)
    caption.run(own)
    assert folder_bytes(out) == folder_bytes(made)


def worker_rows(own: CaptionConfig, *, filters: FilterConfig | None = None) -> tuple[dict[str, Any], dict]:
    """What one worker makes of the whole table: rows by name, and the counts."""
    worker = Worker(own, filters or check(own), "m")
    table = rows_of(own.clips)
    source = read_certificate(own.clips)
    assert source is not None
    receipts = [worker(unit.payload) for unit in plan_units(own.model_copy(update={"unit_rows": 64}), source)]
    worker.close()
    assert len(receipts) == 1
    changed = {[*table][int(n)]: row for n, row in receipts[0]["changed"].items()}
    return changed, receipts[0]["counts"]


@pytest.mark.ray
def test_a_caption_unlike_its_clip_is_not_used_and_counted(clips: str, model: str, tmp_path: Path):
    name, weights = save_tiny(tmp_path, MODELS["vit"])
    clip = ClipConfig(name=name, pretrained=weights)
    own = config(clips, model, tmp_path / "out", clip=clip, min_similarity=1.0)
    changed, counts = worker_rows(own)
    assert counts == {"unlike": 4, "unreadable": 1}
    assert "poor" not in changed  # it keeps its words
    for name in ("silent", "still", "picture"):
        assert changed[name]["status"] == Status.FILTERED_UNLIKE_CAPTION
        assert changed[name]["error"].startswith("similarity") and changed[name]["caption"] is None


@pytest.mark.ray
def test_a_redrive_of_captioned_clips_lists_the_words_that_were_found(clips: str, made: Path):
    assert crawl_config(str(made)) == crawl_config(clips)
    row = rows_of(made)["poor"]
    assert redrive._cut(row).caption == "dog" != row["caption"]


def test_which_clips_want_words_follows_their_status_and_length(tmp_path: Path):
    def wanted(which: str, status: Status, words: str | None) -> bool:
        own = CaptionConfig(clips="c", out=str(tmp_path), which=which)  # type: ignore[arg-type]
        return wants_caption({"status": status.value, "caption": words}, own)

    for which in ("silent", "poor", "all"):
        assert wanted(which, Status.FILTERED_NO_CAPTION, None) and wanted(which, Status.OK, None)
        assert not wanted(which, Status.FILTERED_STATIC, None) and not wanted(which, Status.UNDECODABLE, "dog")
        assert wanted(which, Status.OK, "dog") == (which != "silent")
        assert wanted(which, Status.OK, GOOD) == (which == "all")


@pytest.mark.ray
def test_what_can_not_work_is_refused_before_ray_starts(
    clips: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match=r"vimi-data crawl"):
        check(config(str(tmp_path), model, tmp_path / "out"))
    with pytest.raises(ConfigError, match="the output is the input"):
        check(config(clips, model, Path(clips)))
    with pytest.raises(ConfigError, match="no folder, and no name"):
        check(config(clips, "/no/such", tmp_path / "out"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is a bert; legal: an image-text-to-text model"):
        check(config(clips, str(tmp_path / "bert"), tmp_path / "out"))
    for prompt in ("{words}", "{", " ", "{0}"):
        with pytest.raises(ConfigError, match=r"\{caption\}"):
            CaptionConfig.load(options={"clips": clips, "out": str(tmp_path), "prompt": prompt})


def test_tables_of_an_earlier_version_are_read_without_the_new_columns():
    old = pa.schema([field for field in CLIPS if not field.name.startswith("caption_")])
    check_table(old, CLIPS, "old")
    with pytest.raises(ValueError, match="source_sha256"):
        check_table(pa.schema([field for field in old if field.name != "source_sha256"]), CLIPS, "cut")
