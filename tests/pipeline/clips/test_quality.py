"""Laws of the filters of motion and picture quality: measured, bounded, off unless asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from cli.demo import locate
from infra.clip import ClipConfig
from infra.errors import ConfigError
from pipeline.clips.filters import FilterConfig
from pipeline.clips.parent import inspect_parent
from pipeline.clips.quality import (
    AestheticConfig,
    QualityConfig,
    aesthetic_score,
    check_quality,
    judge_motion,
    largest_motion,
    sharpness,
)
from pipeline.clips.sources import Cut, Item
from pipeline.schema import Status
from tests.infra.tiny_clips import MODELS, save_tiny


def status_of(path: Path, **quality: Any) -> tuple[str, str | None]:
    filters = FilterConfig(quality=QualityConfig(**quality))
    item = Item(str(path), cuts=(Cut("a caption"),)).to_json()
    (row,) = inspect_parent(item, {"local_uri": str(path)}, "whole", filters)
    return row["status"], row.get("error")


@given(st.integers(0, 200), st.integers(0, 55))
def test_motion_is_the_mean_difference_of_the_pair_that_differs_most(grey: int, step: int):
    still = np.full((2, 8, 8, 3), grey, np.uint8)
    moved = np.stack([still[0], still[0] + step])
    assert largest_motion(np.stack([still, moved, still])) == step
    bounds = QualityConfig(min_motion=10, max_motion=40)
    assert (judge_motion(np.stack([still, moved]), bounds) is None) == (10 <= step <= 40)


def test_clips_that_move_too_little_or_too_much_leave_with_their_motion(tmp_path: Path, write_video):
    film = write_video(tmp_path / "film.mp4")
    assert status_of(film) == (Status.OK, None)
    assert status_of(film, min_motion=1, max_motion=200) == (Status.OK, None)
    status, error = status_of(film, min_motion=200)
    assert status == Status.FILTERED_MOTION and error and error.startswith("motion ") and "< 200" in error
    assert status_of(film, max_motion=0.5)[0] == Status.FILTERED_MOTION


def test_blurred_pictures_and_videos_leave_and_sharp_ones_stay(tmp_path: Path, write_video):
    with Image.open(locate("scikit-image", "skimage/data/coffee.png")) as picture:
        sharp = picture.convert("RGB")
    blurred = sharp.filter(ImageFilter.GaussianBlur(6))
    assert sharpness(blurred) < 20 < 100 < sharpness(sharp)
    for name, image in (("sharp", sharp), ("blurred", blurred)):
        image.save(tmp_path / f"{name}.png")
        frames = [np.asarray(image.resize((320, 200)))[:, n : n + 256] for n in range(30)]
        write_video(tmp_path / f"{name}.mp4", size_px=(200, 256), frames=lambda n, f=frames: f[n])
        for suffix in ("png", "mp4"):
            status, error = status_of(tmp_path / f"{name}.{suffix}", min_sharpness=60)
            assert status == (Status.OK if name == "sharp" else Status.FILTERED_QUALITY), (name, suffix, error)


def test_an_aesthetic_head_scores_clip_vectors_and_a_file_that_is_none_is_refused(tmp_path: Path):
    """A linear layer as LAION's, and a TorchScript: the same weights, the same score."""
    layer = torch.nn.Linear(24, 1)
    torch.save(layer.state_dict(), tmp_path / "head.pth")
    torch.jit.script(layer).save(str(tmp_path / "head.pt"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    name, weights = save_tiny(tmp_path, MODELS["vit"])
    clip = ClipConfig(name=name, pretrained=weights)
    scores = [
        aesthetic_score(picture, AestheticConfig(head=str(tmp_path / name), clip=clip))
        for name in ("head.pth", "head.pt")
    ]
    assert scores[0] == pytest.approx(scores[1])
    for least, status in ((scores[0] - 0.1, Status.OK), (scores[0] + 0.1, Status.FILTERED_QUALITY)):
        own = {"head": str(tmp_path / "head.pth"), "clip": clip, "min_score": least}
        assert status_of(tmp_path / "picture.png", aesthetic=own)[0] == status
    (tmp_path / "words.pth").write_text("no head")
    with pytest.raises(ConfigError, match="is no aesthetic head"):
        check_quality(QualityConfig(aesthetic=AestheticConfig(head=str(tmp_path / "words.pth"), clip=clip)))
