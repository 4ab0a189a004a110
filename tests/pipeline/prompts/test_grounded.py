"""Laws of grounded subjects: one box a phrase, nobody else's, whole, and the phrase at a second look."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cli.demo import locate
from infra.clip import Clip, ClipConfig, load_clip
from infra.errors import ConfigError
from infra.grounding import Boxes
from pipeline.prompts.subjects.crops import clip_crops
from pipeline.prompts.subjects.entities import Entity
from pipeline.prompts.subjects.finder import (
    FinderConfig,
    SubjectConfig,
    SubjectFinder,
    best_frame,
    check_subjects,
    networks,
)
from pipeline.prompts.subjects.grounded import GroundedFinder, Rules, overlap, recheck, suppress
from pipeline.prompts.subjects.saliency import MIN_LEAD
from pipeline.prompts.subjects.verdict import Phrases, Reason, Rejected
from pipeline.schema import PROMPTS, Role
from tests.infra import tiny_grounders
from tests.infra.tiny_clips import MODELS, save_tiny

RULES = Rules(0.25, 0.88, (0.04, 0.9), 48, 0.8, 0.0)
CUP = (70.0, 20.0, 520.0, 370.0)
"""Where the cup is in the photograph, 600x400."""


class Planted:
    """A detector and segmenter that says what was planted: phrase -> boxes with scores."""

    def __init__(
        self,
        boxes: dict[str, list[tuple[tuple[float, ...], float]]],
        mask_score: float = 1.0,
        masked: tuple[float, ...] | None = None,
    ) -> None:
        """`masked`: what the segmenter sees in place of the whole box."""
        self.boxes, self.mask_score, self.masked = boxes, mask_score, masked

    def find(
        self, pictures: Sequence[Image.Image], phrases: Sequence[str], *, min_score: float, batch_size: int
    ) -> list[Boxes]:
        planted = [[p for p in self.boxes.get(words, []) if p[1] > min_score] for words in phrases]
        return [
            Boxes(np.array([box for box, _ in p], np.float32).reshape(-1, 4), np.array([s for _, s in p]))
            for p in planted
        ]

    def masks(self, picture: Image.Image, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        masks = np.zeros((len(boxes), picture.height, picture.width), bool)
        boxes = boxes if self.masked is None else np.array([self.masked] * len(boxes))
        for mask, (left, top, right, bottom) in zip(masks, boxes.round().astype(int), strict=True):
            mask[top:bottom, left:right] = True
        return masks, np.full(len(boxes), self.mask_score)


class Lenient(GroundedFinder):
    """Whatever was planted is what its phrase says."""

    def _recheck(self, frame: np.ndarray, cut: Any, phrases: Phrases) -> dict[Entity, Reason]:
        return {}


@pytest.fixture(scope="module")
def frame() -> np.ndarray:
    with Image.open(locate("scikit-image", "skimage/data/coffee.png")) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(ClipConfig(name="offline"))


def reasons(planted: Planted, caption: str, frame: np.ndarray, clip: Clip) -> dict[str, Reason | None]:
    found = GroundedFinder(planted, planted, clip, RULES).find([frame], Phrases.of(caption))
    return {one.entity.text: one.reason if isinstance(one, Rejected) else None for one in found}


ONE = "A red cup stands on a table."


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([(CUP, 0.9)], None),
        ([(CUP, 0.9), ((75, 25, 515, 365), 0.8)], None),  # the same thing twice
        ([(CUP, 0.9), ((0, 0, 100, 100), 0.3)], Reason.AMBIGUOUS),
        ([(CUP, 0.2)], Reason.NO_BOX),
        ([], Reason.NO_BOX),
        ([((300, 200, 345, 400), 0.9)], Reason.TOO_SMALL),  # a narrow one
        ([((300, 200, 390, 290), 0.9)], Reason.TOO_SMALL),  # 3.4 % of the picture
        ([((-50, -50, 700, 500), 0.9)], Reason.TOO_LARGE),
        ([((0, 0, 600, 200), 0.9)], Reason.CUT_OFF),
    ],
)
def test_a_phrase_has_one_box_neither_small_nor_large_nor_cut_off(
    boxes: list, reason: Reason | None, frame: np.ndarray, clip: Clip
):
    assert reasons(Planted({"red cup": boxes}), ONE, frame, clip) == {"red cup": reason}


def test_two_phrases_never_share_a_box_and_the_surer_has_it(frame: np.ndarray, clip: Clip):
    planted = Planted({"red cup": [(CUP, 0.9)], "silver spoon": [((80, 20, 520, 370), 0.6)]})
    found = reasons(planted, "A red cup beside a silver spoon.", frame, clip)
    assert found == {"red cup": None, "silver spoon": Reason.SAME_BOX}


def test_a_cut_out_that_is_another_phrase_of_the_caption_is_rejected(frame: np.ndarray, clip: Clip):
    """The detector takes the cup for the man: CLIP does not."""
    found = reasons(Planted({"man": [(CUP, 0.9)]}), "A man drinks from a red cup.", frame, clip)
    assert found == {"man": Reason.OTHER_WORD, "red cup": Reason.NO_BOX}


def test_a_mask_that_the_segmenter_doubts_is_rejected(frame: np.ndarray, clip: Clip):
    planted = Planted({"red cup": [(CUP, 0.9)]}, mask_score=0.5)
    assert reasons(planted, ONE, frame, clip) == {"red cup": Reason.NO_MASK}


@pytest.mark.parametrize(
    ("masked", "reason"),
    [
        ((200, 200, 212, 212), Reason.TOO_SMALL),  # its logo
        ((200, 100, 250, 150), Reason.TOO_SMALL),  # 50 px, but 1 % of the picture
        ((1, 1, 599, 399), Reason.TOO_LARGE),  # the table that it stands on
        (CUP, None),
    ],
)
def test_a_mask_is_held_to_the_size_of_a_box(
    masked: tuple[float, ...], reason: Reason | None, frame: np.ndarray, clip: Clip
):
    planted = Planted({"red cup": [(CUP, 0.9)]}, masked=masked)
    assert reasons(planted, ONE, frame, clip) == {"red cup": reason}


def test_what_a_second_look_rejects_is_shown_as_it_was_cut_out(frame: np.ndarray, clip: Clip):
    planted = Planted({"man": [(CUP, 0.9)]})
    phrases = Phrases.of("A man drinks from a red cup.")
    man, cup = GroundedFinder(planted, planted, clip, RULES).find([frame], phrases)
    assert isinstance(man, Rejected) and man.mask is not None
    assert man.mask.box == tuple(int(edge) for edge in CUP)
    assert isinstance(cup, Rejected) and cup.mask is None  # it had no box


@pytest.mark.parametrize(
    ("caption", "dogs", "error"),
    [
        ("A red cup and a dog in a park.", [((525.0, 200.0, 599.0, 399.0), 0.9)], None),
        ("A red cup and a dog in a park.", [((525.0, 200.0, 599.0, 399.0), 0.9), (CUP, 0.5)], "dog"),
        ("A red cup and a dog in a park.", [], "dog"),
        ("A red cup and some dogs in a park.", [], "dogs"),
        ("A red cup in a park.", [], None),
    ],
)
def test_a_place_is_shown_only_where_all_that_the_caption_names_is_cut_out(
    caption: str, dogs: list, error: str | None, frame: np.ndarray, clip: Clip, tmp_path: Path
):
    anything = replace(RULES, min_similarity=-1.0, box_frac=(0.0, 1.0))
    finder = SubjectFinder(SubjectConfig(finder=FinderConfig(kind="grounded"), background_prob=1.0))
    planted = Planted({"red cup": [(CUP, 0.9)], "dog": dogs})
    finder.__dict__ |= {"clip": clip, "finder": Lenient(planted, planted, clip, anything)}
    Image.fromarray(frame).save(tmp_path / "cup.png")
    row = {**dict.fromkeys(PROMPTS.names), "clip_id": "c", "media": "image", "caption": caption}
    row |= {"source_uri": str(tmp_path / "cup.png"), "segments": []}
    crops = clip_crops(row, finder, np.random.default_rng(0), local_uri=None)
    assert [crop["status"] for crop in crops if crop["phrase"] == "red cup"] == ["ok"]
    (place,) = [crop for crop in crops if crop["nature"] == "place"]
    assert place["error"] == (error and Reason.NOT_ALL_CUT)
    pictures = finder.find(caption, [frame], np.random.default_rng(0))
    assert not isinstance(pictures, str)
    assert (Role.BACKGROUND in {picture.role for picture in pictures}) == (error is None)


def test_a_cut_out_of_the_only_phrase_is_held_to_its_clips_own_scale(tmp_path: Path, frame: np.ndarray):
    name, weights = save_tiny(tmp_path, MODELS["vit"])
    detector = tiny_grounders.save("sam3", tmp_path / "sam3")
    for clip, least in [(ClipConfig(name="offline"), 0.4), (ClipConfig(name=name, pretrained=weights), 0.24)]:
        own = FinderConfig(kind="grounded", detector=detector)
        finder = SubjectFinder(SubjectConfig(finder=own, clip=clip)).finder
        assert isinstance(finder, GroundedFinder) and finder.rules.min_similarity == least
        given = SubjectConfig(finder=own.model_copy(update={"min_similarity": 0.1}), clip=clip)
        other = SubjectFinder(given).finder
        assert isinstance(other, GroundedFinder) and other.rules.min_similarity == 0.1
        if clip.name == "offline":
            planted = Planted({"panda": [(CUP, 0.9)]})
            found = GroundedFinder(planted, planted, finder.clip, finder.rules).find(
                [frame], Phrases.of("A panda sits.")
            )
            assert [one.reason for one in found if isinstance(one, Rejected)] == [Reason.UNLIKE]


def test_every_phrase_of_every_frame_has_a_verdict_and_the_fullest_frame_is_shown(
    frame: np.ndarray, clip: Clip
):
    planted = Planted({"red cup": [(CUP, 0.9)]})
    finder = GroundedFinder(planted, planted, clip, RULES)
    phrases = Phrases.of("A man drinks from a red cup at a table.")
    grey = np.full_like(frame, 128)
    verdicts = finder.find([grey[:100, :100], frame, frame], phrases)
    assert [(v.frame, v.entity) for v in verdicts] == [(n, e) for n in range(3) for e in phrases.subjects]
    shown = best_frame(verdicts)
    assert [(found.frame, found.entity.text) for found in shown] == [(1, "red cup")]
    assert shown[0].mask.box == tuple(int(edge) for edge in CUP)


BOX = st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 40)] * 2).map(
    lambda b: np.array([b[0], b[1], b[0] + b[2], b[1] + b[3]], np.float32)
)


@given(BOX, BOX)
def test_overlap_is_symmetric_one_for_itself_and_below_one_else(one: np.ndarray, other: np.ndarray):
    assert overlap(one, one) == 1
    assert 0 <= overlap(one, other) == overlap(other, one) <= 1
    assert (overlap(one, other) == 1) == bool((one == other).all())


@given(st.lists(BOX, min_size=1, max_size=6), st.floats(0, 0.99))
def test_suppression_keeps_the_surest_and_no_two_that_overlap(boxes: list[np.ndarray], bound: float):
    kept = suppress(np.stack(boxes), bound)
    assert kept[0] == 0
    assert all(overlap(boxes[a], boxes[b]) <= bound for a in kept for b in kept if a != b)
    assert all(
        any(overlap(boxes[n], boxes[k]) > bound for k in kept if k < n) for n in {*range(len(boxes))} - {*kept}
    )


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5), st.floats(-1, 1, width=32))
def test_a_cut_out_stands_for_its_phrase_only_if_clearly_nearest_and_near_enough(
    row: list[float], least: float
):
    similarity = np.array(row, np.float32)
    said = recheck(similarity, 0, least)
    lead = similarity[0] - similarity[1:].max(initial=-9)
    assert said == (Reason.OTHER_WORD if lead < MIN_LEAD else Reason.UNLIKE if similarity[0] < least else None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FinderConfig:
    """Real classes, random weights: they find anything anywhere, so nothing is too large for them."""
    folder = tmp_path_factory.mktemp("tiny")
    return FinderConfig(
        kind="grounded",
        detector=tiny_grounders.save("sam3", folder / "sam3"),
        segmenter=str(folder / "none"),
        min_box_score=0.0,
        max_iou=0.0,
        box_frac=(0.0, 1.0),
        min_side_px=1,
    )


def test_a_config_names_the_networks_and_the_same_clip_gives_the_same_pictures(
    tiny: FinderConfig, tmp_path: Path, frame: np.ndarray
):
    detector = tiny_grounders.save("grounding_dino", tmp_path / "dino")
    segmenter = tiny_grounders.save("sam", tmp_path / "sam")
    name, weights = save_tiny(tmp_path, MODELS["vit"])
    tiny_clip = ClipConfig(name=name, pretrained=weights)
    for own in (tiny, tiny.model_copy(update={"detector": detector, "segmenter": segmenter})):
        config = SubjectConfig(finder=own, clip=tiny_clip, background_prob=1.0)
        check_subjects(config)
        expected = {"clip", "detector"} | ({"segmenter"} if own is not tiny else set())
        assert set(networks(config)) == expected
        finder = SubjectFinder(config)
        found = [finder.find(ONE, [frame] * 2, np.random.default_rng(1)) for _ in range(2)]
        assert found[0] == found[1]
        said = found[0]
        assert said in set(Reason) if isinstance(said, str) else said[0].role == Role.SUBJECT


def test_a_finder_that_can_not_work_is_refused_before_it_is_loaded(tiny: FinderConfig, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"subjects\.clip is null.*cure: --set subjects\.clip\.name"):
        check_subjects(SubjectConfig(finder=tiny, clip=None))
    own = tiny.model_copy(update={"detector": tiny_grounders.save("owlv2", tmp_path / "owl")})
    with pytest.raises(ConfigError, match=r"cure: set subjects\.finder\.segmenter to a folder"):
        check_subjects(SubjectConfig(finder=own, clip=ClipConfig(name="offline")))
