"""The CLIP's vectors: equal to open_clip's own, whatever the batch, the text or the picture."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw

from infra.clip import Clip, ClipConfig, load_clip
from infra.clip.preprocess import Preprocessing
from model.prompt.clip_encoder import pool_patches
from tests.infra.tiny_clips import MODELS, mini_clip, save_tiny

TEXTS = [
    "a white dog on grass",
    "",
    "two people cooking in a small kitchen while it rains outside",
    "x",
    "a cat",
    "word " * 300,
]


@pytest.fixture(scope="module")
def offline() -> Clip:
    return load_clip(ClipConfig(name="offline", precision="fp32"), batch_size=3)


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A random model of each kind, through a config file and a checkpoint."""
    name, weights = save_tiny(tmp_path_factory.mktemp("clip"), MODELS[request.param])
    return load_clip(ClipConfig(name=name, pretrained=weights, precision="fp32"), batch_size=2)


def pictures(number: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 90, (number, 2))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def unit(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).numpy()


@torch.inference_mode()
def test_text_vectors_equal_open_clips_own_on_padded_batches(tiny: Clip) -> None:
    ids, _ = tiny.tokenize(TEXTS)
    model: Any = tiny.model
    expected = unit(model.encode_text(ids))
    np.testing.assert_allclose(tiny.encode_texts(TEXTS), expected, atol=2e-5)


@torch.inference_mode()
def test_image_vectors_equal_open_clips_own(tiny: Clip) -> None:
    images = pictures(5)
    transform: Any = image_transform_v2(PreprocessCfg(**tiny.preprocessing.model_dump()), is_train=False)
    model: Any = tiny.model
    out = model.visual(torch.stack([transform(image) for image in images]))
    expected = unit(out[0] if isinstance(out, tuple) else out)
    np.testing.assert_allclose(tiny.encode_images(images), expected, atol=2e-5)


def test_tokens_of_both_towers_share_the_joint_width(tiny: Clip) -> None:
    states, mask = tiny.text_tokens(TEXTS)
    patches = tiny.image_tokens(pictures(3))
    assert states.shape == (len(TEXTS), mask.shape[1], tiny.dim)
    assert patches.shape[0] == 3 and patches.shape[2] == tiny.dim
    assert mask.any(-1).all() and not states[~mask].any()
    assert states.isfinite().all() and patches.isfinite().all()


def test_token_states_do_not_depend_on_the_batch(tiny: Clip) -> None:
    states, mask = tiny.text_tokens(TEXTS)
    for row, text in enumerate(TEXTS):
        alone, alone_mask = tiny.text_tokens([text])
        torch.testing.assert_close(states[row][mask[row]], alone[0][alone_mask[0]], atol=2e-5, rtol=1e-4)


def test_the_offline_clip_is_an_open_clip_model_of_unit_float32_vectors(offline: Clip) -> None:
    assert isinstance(offline.model, CustomTextCLIP)
    images, texts = offline.encode_images(pictures(4)), offline.encode_texts(TEXTS)
    for vectors in (images, texts):
        assert vectors.dtype == np.float32 and vectors.shape[1] == offline.dim == 384
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_offline_token_states_average_to_the_text_vector(offline: Clip) -> None:
    states, mask = offline.text_tokens(TEXTS)
    means = states.sum(1) / mask.sum(1, keepdim=True)
    np.testing.assert_allclose(unit(means), offline.encode_texts(TEXTS), atol=2e-5)


def test_offline_clip_knows_a_photograph(offline: Clip) -> None:
    """A real picture: scikit-learn's flower is nearer to a flower than to what it is not."""
    datasets = pytest.importorskip("sklearn.datasets")
    flower = datasets.load_sample_image("flower.jpg")
    texts = ["a close-up of a flower in a garden", "a man riding a motorcycle", "an office at night"]
    similarity = offline.encode_images([flower]) @ offline.encode_texts(texts).T
    assert similarity[0].argmax() == 0


def test_offline_picture_tokens_tell_the_colour_of_a_thing(offline: Clip) -> None:
    """Ridge regression from 3x3 tokens to red, green and blue, held out; class names alone give R² .1."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (320, 3))
    things = [coloured_thing(colour, rng) for colour in colours]
    tokens = pool_patches(offline.image_tokens(things), 3).flatten(1).numpy().astype(np.float64)
    assert tokens.shape == (320, 9 * 384)
    assert held_out_r2(tokens, colours / 255, num_train=256) >= 0.75


def coloured_thing(colour: np.ndarray, rng: np.random.Generator, side_px: int = 96) -> Image.Image:
    """A thing of one of three shapes, somewhere before a background of another colour."""
    image = Image.new("RGB", (side_px, side_px), tuple(rng.integers(0, 256, 3).tolist()))
    size = int(side_px * rng.uniform(0.6, 0.8))
    left, top = rng.integers(0, side_px - size + 1, 2).tolist()
    right, bottom, fill = left + size, top + size, tuple(colour.tolist())
    draw, shape = ImageDraw.Draw(image), rng.integers(3)
    if shape == 0:
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif shape == 1:
        draw.rectangle((left, top, right, bottom), fill=fill)
    else:
        draw.polygon([(left, bottom), (right, bottom), (left + size // 2, top)], fill=fill)
    return image


def held_out_r2(x: np.ndarray, y: np.ndarray, *, num_train: int, penalty: float = 0.03) -> float:
    """R² of a ridge regression in its dual form; `penalty` in mean squared norms of a row of `x`."""
    x, mean = x - x[:num_train].mean(0), y[:num_train].mean(0)
    train, test = x[:num_train], x[num_train:]
    kernel = train @ train.T
    ridge = penalty * kernel.trace() / num_train
    weights = np.linalg.solve(kernel + ridge * np.eye(num_train), y[:num_train] - mean)
    errors = y[num_train:] - mean - test @ (train.T @ weights)
    return float(1 - (errors**2).sum() / ((y[num_train:] - y[num_train:].mean(0)) ** 2).sum())


@torch.inference_mode()
def test_offline_vectors_are_what_the_classifier_says_alone(offline: Clip) -> None:
    """To the bit, whatever the tokens hold: a memory of before is one of now."""
    visual: Any = offline.model.visual
    pixels = offline.preprocess(pictures(3))
    logits = visual.trunk(offline.preprocessing.normalise(pixels, torch.device("cpu")))
    np.testing.assert_array_equal(
        offline.encode_pixels(pixels), unit(logits.softmax(-1) @ visual.class_vectors)
    )
    weights = set(visual.state_dict())
    assert weights == {"class_vectors", *(f"trunk.{name}" for name in visual.trunk.state_dict())}


def test_no_rows_give_no_vectors(offline: Clip) -> None:
    assert offline.encode_images([]).shape == (0, 384)
    assert offline.encode_texts([]).shape == (0, 384)


def test_rows_keep_their_order_whatever_their_length(offline: Clip) -> None:
    together = offline.encode_texts(TEXTS)
    apart = np.concatenate([offline.encode_texts([text]) for text in TEXTS])
    np.testing.assert_allclose(together, apart, atol=2e-5)


def test_bf16_stays_near_fp32(offline: Clip) -> None:
    half = load_clip(ClipConfig(name="offline", precision="bf16"))
    assert half.model_hash == offline.model_hash
    texts = (half.encode_texts(TEXTS) * offline.encode_texts(TEXTS)).sum(1)
    images = (half.encode_images(pictures(4)) * offline.encode_images(pictures(4))).sum(1)
    assert texts.min() > 0.999 and images.min() > 0.98


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK"]),
    resize=st.sampled_from(["shortest", "squash", "longest"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    seed=st.integers(0, 99),
)
def test_preprocessing_equals_open_clips_transform(
    width: int, height: int, mode: str, resize: str, interpolation: str, seed: int
) -> None:
    if max(width, height) > 20 * min(width, height):
        height = width
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    values = {"mean": (0.48, 0.45, 0.4), "std": (0.26, 0.26, 0.27), "interpolation": interpolation}
    ours = Preprocessing.of({"size": 24, "resize_mode": resize, **values})
    transform: Any = image_transform_v2(
        PreprocessCfg(size=24, resize_mode=resize, **values),  # type: ignore[arg-type]
        is_train=False,
    )
    found = ours.normalise(ours.batch([image]), torch.device("cpu"))
    torch.testing.assert_close(found[0], transform(image), atol=1e-6, rtol=1e-6)


def test_arrays_and_pil_images_are_the_same_picture(offline: Clip) -> None:
    image = pictures(1)[0]
    np.testing.assert_array_equal(offline.preprocess([image]), offline.preprocess([np.asarray(image)]))
    pixels = offline.preprocess([image])
    np.testing.assert_array_equal(offline.encode_pixels(pixels), offline.encode_images([image]))


def test_an_absurd_aspect_ratio_costs_no_memory(offline: Clip) -> None:
    assert offline.preprocess([Image.new("RGB", (1, 60_000))]).shape == (1, 224, 224, 3)


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)])
def test_what_is_no_picture_is_refused(offline: Clip, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        offline.encode_images([bad])


def test_a_text_of_100_kilobytes_without_a_space_takes_no_time(tmp_path: Path) -> None:
    name, weights = save_tiny(tmp_path, MODELS["vit"])
    clip = load_clip(ClipConfig(name=name, pretrained=weights))
    start = time.monotonic()
    assert clip.encode_texts(["a" * 100_000]).shape == (1, 24)
    assert time.monotonic() - start < 5


def test_the_mini_clip_of_the_assets_finds_pictures_by_their_captions(assets: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    clip = load_clip(mini_clip(assets / "weights", tmp_path))
    rows = pq.read_table(assets / "msrvtt" / "train.parquet").slice(0, 60).to_pylist()
    images = [row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"] for row in rows]
    found = clip.encode_images([Image.open(io.BytesIO(data)) for data in images])
    scores = clip.encode_texts([row["caption"] for row in rows]) @ found.T
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    assert (ranks < 10).mean() > 0.5  # by chance: 10 of 60
