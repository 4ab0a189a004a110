"""FVD orders known transformations of real clips, and CLIP-T tells their captions from others."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from infra.errors import ConfigError
from model.evaluate.distances import Moments, frechet_distance
from model.evaluate.networks import ClipNetwork, I3dNetwork, NetworkConfig
from pipeline.evaluate.decode import leading_frames

pytestmark = [pytest.mark.slow, pytest.mark.assets]
NUM_CLIPS, NUM_FRAMES = 8, 16
Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def noise(clip: np.ndarray, strength: float, draw: np.random.Generator) -> np.ndarray:
    return (clip + draw.normal(size=clip.shape) * 60 * strength).clip(0, 255).astype(np.uint8)


def blur(clip: np.ndarray, strength: float, draw: np.random.Generator) -> np.ndarray:
    kernel = ImageFilter.GaussianBlur(6 * strength)
    return np.stack([np.asarray(Image.fromarray(frame).filter(kernel)) for frame in clip])


def shuffle(clip: np.ndarray, strength: float, draw: np.random.Generator) -> np.ndarray:
    order, some = np.arange(len(clip)), draw.permutation(len(clip))[: round(strength * len(clip))]
    order[np.sort(some)] = some
    return clip[order]


def drop(clip: np.ndarray, strength: float, draw: np.random.Generator) -> np.ndarray:
    """Lost frames: the one before is shown again."""
    lost = set(draw.permutation(np.arange(1, len(clip)))[: round(strength * (len(clip) - 1))].tolist())
    kept = [0]
    for n in range(1, len(clip)):
        kept.append(kept[-1] if n in lost else n)
    return clip[kept]


@pytest.fixture(scope="module")
def clips(assets: Path) -> list[np.ndarray]:
    files = sorted((assets / "droid" / "clips").glob("*.mp4"))
    return [
        leading_frames(str(file), NUM_FRAMES, stride=2)
        for file in files[:: len(files) // NUM_CLIPS][:NUM_CLIPS]
    ]


@pytest.fixture(scope="module")
def features() -> Callable[[list[np.ndarray]], np.ndarray]:
    network = I3dNetwork(NetworkConfig(), torch.device("cpu"))
    try:
        network.find(NetworkConfig())
    except ConfigError as error:
        pytest.skip(str(error))
    return lambda videos: np.stack([network(video) for video in videos])


@pytest.fixture(scope="module")
def real(clips, features) -> np.ndarray:
    return features(clips)


def moments(x: np.ndarray) -> Moments:
    found = Moments(x.shape[1])
    found.add(x)
    return found


@pytest.mark.parametrize("change", [noise, blur, shuffle, drop], ids=lambda change: change.__name__)
def test_fvd_grows_with_what_is_done_to_real_clips(change: Change, clips, real, features) -> None:
    found = [frechet_distance(moments(real), moments(real))]
    for strength in (0.25, 1.0):
        draw = np.random.default_rng(0)
        changed = features([change(clip, strength, draw) for clip in clips])
        found.append(frechet_distance(moments(real), moments(changed)))
        assert found[-1] == pytest.approx(without_roots(real, changed), rel=1e-6)
    print(change.__name__, [round(value, 3) for value in found])
    assert found[0] < 1e-6 * found[1] < 1e-6 * found[2]


def without_roots(x: np.ndarray, y: np.ndarray) -> float:
    """An independent Fréchet distance: tr (C₁ C₂)^½ is the sum of the singular values of X Yᵀ, rows centred.

    SciPy's square root of the product is off by 3e-6 at so low a rank.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    one, two = ((part - part.mean(0)) / np.sqrt(len(part) - 1) for part in (x, y))
    shared = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    return float(
        np.square(x.mean(0) - y.mean(0)).sum() + np.square(one).sum() + np.square(two).sum() - 2 * shared
    )


def test_clip_t_finds_the_caption_of_real_clips(assets: Path) -> None:
    rows = [json.loads(line) for line in (assets / "panda" / "captions.jsonl").read_text().splitlines()][:24]
    network = ClipNetwork(NetworkConfig.model_validate({"clip": {"name": "offline", "precision": "fp32"}}),
                          torch.device("cpu"))  # fmt: skip
    frames = [network(leading_frames(str(assets / "panda" / row["clip"]), 2, stride=16)) for row in rows]
    images, texts = np.stack([one.mean(0) for one in frames]), network.texts([row["caption"] for row in rows])
    similar = images @ texts.T
    own, others = np.diag(similar), similar[~np.eye(len(rows), dtype=bool)]
    assert own.mean() - others.mean() > 3 * others.std() / len(rows) ** 0.5
