"""Validate: proves good shards, and finds each way in which they can be wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.certificate import read_certificate, read_sealed, write_certificate, write_sealed
from infra.errors import ConfigError
from pipeline.prompts.augment import AugmentConfig, run
from pipeline.report.shard_checks import Report
from pipeline.report.validate import ValidateConfig, validate
from pipeline.schema import PROMPTS
from pipeline.shards import META_FILE, REJECTED_FILE, write_meta, write_shard

pytestmark = pytest.mark.ray
Row = dict[str, Any]


@pytest.fixture(scope="module")
def good(world: Any, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good")
    values = {"clips": world.clips, "memory": world.memory, "out": str(out), "shard_rows": 10}
    run(AugmentConfig.model_validate(values))
    return out


def check(out: Path) -> Report:
    return validate(ValidateConfig(prompts=str(out)))


def rewritten(good: Path, out: Path, change: Callable[[Row], None]) -> Path:
    """A copy whose first prompt is changed and which is certified anew, as a dishonest job would."""
    shutil.copytree(good, out)
    certificate = read_certificate(out)
    assert certificate is not None
    shards = [entry for entry in certificate.files if entry.path.startswith("part-")]
    rows = pq.read_table(out / shards[0].path).to_pylist()
    change(rows[0])
    shards[0] = write_shard(str(out / shards[0].path), rows, PROMPTS, row_group_rows=32)
    other = [entry for entry in certificate.files if entry.path == REJECTED_FILE]
    files = [*shards, *other, write_meta(str(out), shards, row_group_rows=32)]
    write_certificate(str(out), certificate.model_copy(update={"files": files}))
    return out


def test_what_augment_makes_is_valid(good: Path, world: Any) -> None:
    report = check(good)
    assert report.is_valid, report.lines()
    assert report.checked["prompts"] == len(world.rows)
    assert report.checked["pictures"] == report.checked["documents against the guard"] > 0
    assert report.lines()[-1] == "valid"


def test_a_flipped_byte_a_missing_and_a_foreign_file_are_found(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(good, out)
    data = bytearray((out / "part-00000.parquet").read_bytes())
    data[1000] ^= 1
    (out / "part-00000.parquet").write_bytes(data)
    (out / "part-00001.parquet").unlink()
    (out / "part-00009.parquet").write_bytes(b"")
    told = check(out).problems["files"]
    assert any("part-00000.parquet is not the file" in words for words in told)
    assert any("part-00001.parquet is missing" in words for words in told)
    assert any("part-00009.parquet is not in the certificate" in words for words in told)


def test_a_certificate_whose_counts_do_not_add_up_is_found(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(good, out)
    place = str(out / "certificate.json")
    write_sealed(place, {**read_sealed(place), "num_in": 25})
    assert "25 rows in" in check(out).problems["certificate"][0]


def swap_segments(row: Row) -> None:
    row["segments"] = row["segments"][::-1]


def spoil_picture(row: Row) -> None:
    row["segments"][1]["image"] = row["segments"][1]["image"][:200]


def cut_target(row: Row) -> None:
    row["target"]["data"] = row["target"]["data"][:-1]


def forge_id(row: Row) -> None:
    row["prompt_id"] = "f" * 24


def drop_document(row: Row) -> None:
    row["segments"] = row["segments"][2:]


def unknown_document(row: Row) -> None:
    for segment in row["segments"][:2]:
        segment["document"]["doc_id"] = "0" * 24


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (swap_segments, "segments"),
        (drop_document, "segments"),
        (spoil_picture, "pictures"),
        (cut_target, "targets"),
        (forge_id, "ids"),
        (unknown_document, "guard"),
    ],
)
def test_a_certified_lie_is_found(good: Path, tmp_path: Path, change: Callable[[Row], None], kind: str) -> None:
    report = check(rewritten(good, tmp_path / "copy", change))
    assert set(report.counts) == {kind}, report.lines()
    assert report.lines()[-1].startswith("NOT valid")


def test_an_id_that_stands_twice_is_named_with_its_number(good: Path, tmp_path: Path) -> None:
    other = pq.read_table(good / "part-00001.parquet", columns=["prompt_id"])["prompt_id"][0].as_py()
    told = check(rewritten(good, tmp_path / "copy", lambda row: row.update(prompt_id=other))).problems["ids"]
    assert f"{other} stands 2 times" in told and len(told) == 2  # and it is not the hash of its row


def test_a_leak_that_was_planted_afterwards_is_found(good: Path, world: Any, tmp_path: Path) -> None:
    """The prompt shows another clip of its own video: ids and hashes are all right, the law is not."""
    from pipeline.memory.embed.worker import row_doc_id

    def plant(row: Row) -> None:
        sibling = next(
            r
            for r in world.rows
            if r["source_sha256"] == row["source_sha256"] and r["clip_id"] != row["clip_id"]
        )
        for segment in row["segments"][:2]:
            segment["document"]["doc_id"] = row_doc_id(sibling)

    report = check(rewritten(good, tmp_path / "copy", plant))
    assert set(report.counts) == {"guard"}
    assert any("same source video" in words for words in report.problems["guard"])


def test_a_wrong_schema_is_found(good: Path, tmp_path: Path) -> None:
    out = rewritten(good, tmp_path / "copy", lambda row: None)
    certificate = read_certificate(out)
    assert certificate is not None
    table = pq.read_table(out / "part-00000.parquet").drop_columns(["caption"])
    schema = pa.schema([f for f in PROMPTS if f.name != "caption"])
    entry = write_shard(str(out / "part-00000.parquet"), table, schema, row_group_rows=32)
    files = [entry if e.path == entry.path else e for e in certificate.files]
    write_certificate(str(out), certificate.model_copy(update={"files": files}))
    assert "missing columns ['caption: string']" in check(out).problems["schema"][0]


def test_a_folder_that_is_not_certified_is_refused(good: Path, world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no certified shards"):
        check(tmp_path)
    with pytest.raises(ConfigError, match="made by 'crawl'"):
        check(Path(world.clips))
    assert META_FILE in {path.name for path in good.iterdir()}
