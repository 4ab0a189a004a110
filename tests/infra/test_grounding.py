"""Laws of grounding: every family of transformers gives boxes of words and masks of boxes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from infra.errors import ConfigError
from infra.grounding import Detector, Segmenter, check_detector, check_segmenter
from infra.pretrained import weights_version
from tests.infra import tiny_grounders

PICTURES = [
    Image.fromarray(np.random.default_rng(n).integers(0, 256, (48, 64, 3), dtype=np.uint8)) for n in range(3)
]
WORDS = ["red dog", "cat", "a square dog with a red cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grounders")


@pytest.mark.parametrize("family", tiny_grounders.DETECTORS)
def test_every_detector_finds_boxes_of_words_whatever_the_batch(family: str, folder: Path):
    detector = Detector(tiny_grounders.save(family, folder / family))
    together = detector.find(PICTURES, WORDS, min_score=0.0, batch_size=2)
    assert len(together) == 3 and all(len(found.scores) for found in together)
    for picture, words, found in zip(PICTURES, WORDS, together, strict=True):
        alone = detector.find([picture], [words], min_score=0.0)[0]
        assert found.boxes.shape == (len(found.scores), 4) and (np.diff(found.scores) <= 0).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        assert found.scores == pytest.approx(alone.scores, abs=1e-5)
        assert (found.masks is not None) == detector.gives_masks
        if found.masks is not None:
            assert found.masks.shape == (len(found.scores), 48, 64) and found.masks.dtype == bool
    least = float(together[0].scores[0])
    assert all((found.scores > least).all() for found in detector.find(PICTURES, WORDS, min_score=least))


@pytest.mark.parametrize("family", tiny_grounders.SEGMENTERS)
def test_every_segmenter_gives_a_mask_of_the_pictures_size_for_each_box(family: str, folder: Path):
    segmenter = Segmenter(tiny_grounders.save(family, folder / family))
    boxes = np.array([[5, 5, 30, 30], [10, 0, 60, 40]], np.float32)
    masks, scores = segmenter.masks(PICTURES[0], boxes)
    assert masks.shape == (2, 48, 64) and masks.dtype == bool and scores.shape == (2,)
    assert (scores > 0.9).all()
    alone, _ = segmenter.masks(PICTURES[0], boxes[1:])
    assert (alone[0] == masks[1]).mean() > 0.99


def as_published(place: str, **config: Any) -> str:
    """The model as its hub has it: named as its video model, and told to use that one's processor."""
    for name, values in (("config.json", config), ("processor_config.json", {})):
        file = Path(place) / name
        found = json.loads(file.read_text())
        found |= values or {
            "processor_class": f"{found['processor_class'].removesuffix('Processor')}VideoProcessor"
        }
        file.write_text(json.dumps(found))
    return place


def test_published_sam_2_and_sam_3_are_read_as_models_of_pictures(folder: Path):
    """SAM 3's detector lies inside of its video model: another layout of config and weights."""
    place = tiny_grounders.save("sam3", folder / "plain")
    expected = Detector(place).find(PICTURES[:1], WORDS[:1], min_score=0.0)[0]
    inner = json.loads((Path(place) / "config.json").read_text())
    (Path(place) / "config.json").write_text("{}")
    as_published(place, model_type="sam3_video", detector_config=inner)
    tensors = load_file(f"{place}/model.safetensors")
    save_file({f"detector_model.{key}": value for key, value in tensors.items()}, f"{place}/model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    found = Detector(place).find(PICTURES[:1], WORDS[:1], min_score=0.0)[0]
    assert (found.scores == expected.scores).all()
    boxes = np.array([[5, 5, 30, 30]], np.float32)
    plain = tiny_grounders.save("sam2", folder / "plain2")
    expected_masks, _ = Segmenter(plain).masks(PICTURES[0], boxes)
    masks, _ = Segmenter(as_published(plain, model_type="sam2_video")).masks(PICTURES[0], boxes)
    assert (masks == expected_masks).all()


def test_what_is_no_detector_or_not_there_is_refused_in_a_line(folder: Path):
    sam = tiny_grounders.save("sam", folder / "sam")
    with pytest.raises(ConfigError, match=r"detector = .*sam is a sam; legal: a model of grounding-dino.*sam3"):
        check_detector(sam, field="detector")
    owl = tiny_grounders.save("owlv2", folder / "owlv2")
    with pytest.raises(ConfigError, match=r"is a owlv2; legal: a model of .*sam_hq"):
        check_segmenter(owl, field="segmenter")
    (folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=r"has no config\.json of transformers.*cure: set my\.field"):
        check_detector(str(folder / "empty"), field="my.field")
    with pytest.raises(ConfigError, match="no folder, and no name"):
        check_detector("/no/such/folder", field="detector")


def test_weights_are_known_by_what_they_are_not_by_where_they_lie(folder: Path):
    one = tiny_grounders.save("sam3", folder / "one")
    same = tiny_grounders.save("sam3", folder / "same")
    other = tiny_grounders.save("owlv2", folder / "other")
    versions = [weights_version(place, "detector", field="detector") for place in (one, same, other)]
    assert versions[0] == versions[1] != versions[2]
