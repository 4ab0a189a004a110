"""Augment: every caption gets honest examples, in order, as shards that are the same every time."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.storage import Certificate, list_files
from pipeline.augment import AugmentConfig, run
from pipeline.schema import PROMPTS, check_table
from pipeline.shards import ShardSet

pytestmark = pytest.mark.ray


def config(world: Any, out: Path, **more: Any) -> AugmentConfig:
    values: dict[str, Any] = {"clips": world.clips, "memory": world.memory, "out": str(out)}
    values |= {"shard_rows": 8, "row_group_rows": 4}
    return AugmentConfig.model_validate(values | more)


def read(out: Path) -> list[dict[str, Any]]:
    shards = ShardSet(str(out))
    groups = [shards.read_row_group(i) for i in range(len(shards))]
    return pa.concat_tables(groups).to_pylist() if groups else []


def contents(out: Path) -> dict[str, bytes]:
    return {Path(f).name: Path(f).read_bytes() for f in list_files(str(out), suffix=".parquet")}


@pytest.fixture(scope="module")
def made(world: Any, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Certificate]:
    out = tmp_path_factory.mktemp("made")
    return out, run(config(world, out))


def test_every_good_clip_becomes_one_prompt(world: Any, made: tuple[Path, Certificate]) -> None:
    out, certificate = made
    rows = read(out)
    assert certificate.num_in == certificate.num_out == len(world.rows) == len(rows)
    assert [row["clip_id"] for row in rows] == [row["clip_id"] for row in world.rows]
    for file in certificate.files:
        if file.path.startswith("part-"):
            check_table(pq.read_schema(out / file.path), PROMPTS, file.path)


def test_segments_are_text_then_picture_by_rank_and_the_caption_last(made: tuple[Path, Certificate]) -> None:
    for row in read(made[0]):
        *retrieved, last = row["segments"]
        assert (last["type"], last["role"], last["text"]) == ("text", "caption", row["caption"])
        assert [s["type"] for s in retrieved] == ["text", "image"] * row["num_documents"]
        assert [s["document"]["rank"] for s in retrieved] == [
            rank for rank in range(1, row["num_documents"] + 1) for _ in "ti"
        ]
        scores = [s["document"]["score"] for s in retrieved]
        assert scores == sorted(scores, reverse=True)
        assert all(s["image"][:2] == b"\xff\xd8" for s in retrieved if s["type"] == "image")
        assert all(s["document"]["clip_similarity"] is not None for s in retrieved)


def test_no_prompt_holds_its_own_source_video(made: tuple[Path, Certificate]) -> None:
    out, certificate = made
    for row in read(out):
        for segment in row["segments"][:-1]:
            assert segment["document"]["source_sha256"] != row["source_sha256"]
    assert certificate.facts["refused"]["self"] == certificate.num_out
    assert certificate.facts["refused"]["sibling"] > 0


def test_target_frames_have_the_training_size(made: tuple[Path, Certificate]) -> None:
    for row in read(made[0]):
        target = row["target"]
        frames = np.frombuffer(target["data"], np.uint8).reshape(
            target["num_frames"], target["height_px"], target["width_px"], 3
        )
        assert frames.shape == (16, 36, 64, 3)
        assert frames.std() > 10
        assert target["fps"] == 16.0  # one second: too short for 16 frames at 6 fps
        assert (row["fps"], row["height_px"], row["width_px"]) == (10.0, 96, 128)


def test_number_of_workers_does_not_change_a_byte(
    world: Any, made: tuple[Path, Certificate], tmp_path: Path
) -> None:
    for workers in (1, 2, 8):
        out = tmp_path / str(workers)
        certificate = run(config(world, out, num_workers=workers))
        assert contents(out) == contents(made[0])
        assert certificate.content_hash() == made[1].content_hash()
