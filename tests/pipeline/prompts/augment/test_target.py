"""Targets of prompts: frames, clips and pictures; what can't be decoded costs one row."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.errors import TooManyFailuresError
from infra.storage import sha256_file
from pipeline.prompts.augment import run, worker
from pipeline.prompts.augment.target import TargetConfig, covering_size, frame_times
from pipeline.report.validate import ValidateConfig, validate
from pipeline.schema import CLIPS
from tests.pipeline.prompts.augment.jobs import config, read

pytestmark = pytest.mark.ray


def test_pictures_are_targets_of_one_frame_at_infinite_rate(
    world: Any, ray_cluster: None, tmp_path: Path
) -> None:
    Image.fromarray(np.full((50, 80, 3), (200, 30, 90), np.uint8)).save(tmp_path / "a.png")
    row = dict.fromkeys(CLIPS.names) | {
        "clip_id": "picture", "media": "image", "caption": "a red dog", "status": "ok",
        "source_uri": str(tmp_path / "a.png"), "local_uri": str(tmp_path / "a.png"),
        "source_sha256": sha256_file(str(tmp_path / "a.png")), "start_s": 0.0, "end_s": 0.0,
        "width_px": 80, "height_px": 50,
    }  # fmt: skip
    broken = row | {"clip_id": "broken", "local_uri": str(tmp_path / "absent.png"), "source_sha256": "d" * 64}
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    torn = row | {"clip_id": "torn", "local_uri": str(tmp_path / "torn.png")}
    torn["source_sha256"] = sha256_file(str(tmp_path / "torn.png"))
    changed = row | {"clip_id": "changed", "source_sha256": "e" * 64}
    silent = row | {"clip_id": "silent", "caption": None, "source_sha256": "f" * 64}
    clips = world.write_clips(tmp_path / "clips", [row, broken, torn, changed, silent])
    more = {"clips": clips, "vectors": "stored", "max_failed_frac": 0.9}
    certificate = run(config(world, tmp_path / "out", **more))
    assert certificate.dead == {"not_found": 1, "undecodable": 1, "changed": 1}
    assert certificate.filtered == {"filtered_no_caption": 1}
    (made,) = read(tmp_path / "out")
    frames = np.frombuffer(made["target"]["data"], np.uint8).reshape(1, 36, 64, 3)
    assert made["target"]["fps"] == np.inf and (frames[0, 18, 32] == (200, 30, 90)).all()
    assert made["segments"][0]["document"]["clip_similarity"] is None  # no vector was wanted
    with pytest.raises(TooManyFailuresError, match="3 of 5 clips could not become prompts"):
        run(config(world, tmp_path / "strict", clips=clips, vectors="stored"))


@pytest.mark.parametrize("kind", ["video", "reference"])
def test_other_kinds_of_target(world: Any, ray_cluster: None, tmp_path: Path, kind: str) -> None:
    run(config(world, tmp_path / "out", target={"kind": kind}))
    rows = read(tmp_path / "out")
    assert {row["target"]["kind"] for row in rows} == {kind}
    if kind == "video":
        assert {(r["target"]["num_frames"], r["target"]["height_px"], r["target"]["fps"]) for r in rows} == {
            (10, 96, 10.0)
        }
    assert validate(ValidateConfig(prompts=str(tmp_path / "out"))).is_valid


def test_the_whole_frame_scaled_and_cropped_is_the_target() -> None:
    for height, width in ((96, 128), (1080, 1920), (1920, 1080), (36, 64), (20, 2000)):
        size = covering_size(height, width, TargetConfig())
        assert size[0] >= 36 and size[1] >= 64 and (size[0] == 36 or size[1] == 64)
    times, rate = frame_times(2.0, 10.0, TargetConfig())
    assert (len(times), rate) == (16, 6.0)
    assert sum(times) / 16 == pytest.approx(6.0)  # taken from the middle
    times, rate = frame_times(2.0, 4.0, TargetConfig())
    assert (len(times), rate, times[0] > 2, times[-1] < 4) == (16, 8.0, True, True)


def test_a_decoder_that_runs_out_of_time_costs_one_row(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody writes to: opening it hangs for ever."""
    os.mkfifo(tmp_path / "hang.mp4")
    stuck = world.rows[0] | {"clip_id": "stuck", "local_uri": str(tmp_path / "hang.mp4"), "media": "image"}
    monkeypatch.setattr(worker, "DECODE_TIMEOUT_S", 3.0)
    augment = worker.AugmentWorker(config(world, tmp_path / "out"), "hash")
    kept, targets, failed = augment.with_targets([stuck, *world.rows[:3]])
    augment.decoder.close()
    assert [row["clip_id"] for row in kept] == [row["clip_id"] for row in world.rows[:3]]
    assert len(targets) == 3 and [row["status"] for row in failed] == ["timeout"]
