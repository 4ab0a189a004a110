"""Laws of the order, the plan and the loader."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from model.data.buckets import Bucket
from model.data.loader import Loader, RowGroups
from model.data.order import Mixture, Order, make_key, permute, permute_all
from model.data.plan import Plan
from model.data.shards import index_shards, open_shards
from model.prompt.pictures import ReferenceSize, reference_tensors

VIDEO = Bucket("video", 8, 24, 40)
IMAGE = Bucket("image", 1, 24, 40)
SMALL: dict[str, Any] = {"lanes": 6, "window_rows": 5}

counts = st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any)


@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_permutation_is_a_bijection_and_vector_equals_scalar(count: int, key: int) -> None:
    values = permute_all(count, key)
    assert sorted(values) == list(range(count))
    assert [permute(i, count, key) for i in range(min(count, 50))] == values[:50].tolist()


@given(rows=counts, lanes=st.integers(1, 9), window=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_epoch_visits_every_row_once(rows: list[int], lanes: int, window: int, seed: int) -> None:
    order = Order(np.array(rows), seed=seed, lanes=lanes, window_rows=window)
    everything = {(g, r) for g, count in enumerate(rows) for r in range(count)}
    for epoch in range(3):
        start = epoch * order.num_rows
        places = [order.locate(i) for i in range(start, start + order.num_rows)]
        assert set(places) == everything


WEIGHTS = st.lists(st.integers(1, 12) | st.floats(0.01, 10), min_size=1, max_size=5)


@given(weights=WEIGHTS, cycle=st.integers(5, 200))
@settings(max_examples=60, deadline=None)
def test_mixture_keeps_its_shares_and_skips_nothing(weights: list[float], cycle: int) -> None:
    names = {str(n): w for n, w in enumerate(weights)}
    mixture = Mixture(names, cycle=cycle)
    assert mixture.cycle <= cycle
    drawn = [mixture.draw(i) for i in range(3 * mixture.cycle)]
    for name, share in zip(mixture.names, mixture.shares, strict=True):
        places = [k for n, k in drawn if n == name]
        assert places == list(range(3 * share))
        if cycle >= 100:
            assert abs(share / mixture.cycle - names[name] / sum(weights)) <= len(weights) / cycle


@given(weights=WEIGHTS, cycle=st.integers(5, 60), start=st.integers(0, 10**9), length=st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_shares_are_exact_over_any_window(weights: list[float], cycle: int, start: int, length: int) -> None:
    """Fewer than two draws off, wherever the window begins and however long it is; counting says the same."""
    mixture = Mixture({str(n): w for n, w in enumerate(weights)}, cycle=cycle)
    drawn = [mixture.draw(i)[0] for i in range(start, start + length)]
    before, after = mixture.count(start), mixture.count(start + length)
    for name, share in zip(mixture.names, mixture.shares, strict=True):
        assert abs(drawn.count(name) - length * share / mixture.cycle) < 2
        assert drawn.count(name) == after[name] - before[name]


def test_simple_shares_are_exact_for_ever() -> None:
    """A third of each is a third, not 333 of 1,000."""
    mixture = Mixture({"a": 1.0, "b": 1.0, "c": 1.0}, cycle=1000)
    assert mixture.count(3 * 10**12) == dict.fromkeys("abc", 10**12)
    assert Mixture({"a": 0.1, "b": 0.3}, cycle=1000).shares == [1, 3]


def test_each_task_has_its_share_of_any_window_of_samples(make_shards, make_row) -> None:
    tasks = ["text_to_video", "video_prediction", "subject_driven"]
    shards = open_shards(str(make_shards(rows=[make_row(n, task=tasks[n % 3]) for n in range(48)])))
    index = index_shards(shards, (VIDEO, IMAGE))
    weights = {"text_to_video": 0.5, "video_prediction": 0.3, "subject_driven": 0.2}
    plan = Plan(index, len(shards.groups), seed=3, micro_batch=10, task_weights=weights)
    drawn = [plan.source(n).stream[1] for n in range(600)]
    for start, length in itertools.product(range(0, 300, 7), (1, 10, 23, 240)):
        window = drawn[start : start + length]
        for task, weight in weights.items():
            assert abs(window.count(task) - weight * length) < 2
    assert plan.count_tasks(600) == {task: drawn.count(task) for task in weights}


def test_seek_is_constant_time_at_a_billion() -> None:
    order = Order(np.full(150_000, 64), seed=0, lanes=48, window_rows=256)
    group, row = order.locate(10**9)
    assert 0 <= group < 150_000 and 0 <= row < 64
    assert order.locate(10**9) == (group, row)


def _index(rows: list[int]) -> pa.Table:
    return pa.table(
        {
            "group": pa.array(range(len(rows)), pa.int64()),
            "bucket": pa.array([0] * len(rows), pa.int32()),
            "task": ["pretrain"] * len(rows),
            "rows": pa.array(rows, pa.int64()),
        }
    )


@given(rows=counts, seed=st.integers(0, 99), position=st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_ranks_share_one_global_order(rows: list[int], seed: int, position: int) -> None:
    plan = Plan(_index(rows), len(rows), seed=seed, micro_batch=12, **SMALL)
    start = position * 12
    whole = [plan.source(p) for p in range(start, start + 24)]
    for world in (1, 2, 3, 4):
        by_rank = [
            [plan.source(p) for s in (start, start + 12) for p in range(s + r, s + 12, world)]
            for r in range(world)
        ]
        assert sorted(map(repr, itertools.chain(*by_rank))) == sorted(map(repr, whole))


def test_weights_that_leave_nothing_to_draw_are_refused() -> None:
    with pytest.raises(ConfigError, match="no bucket that the shards hold has a weight above 0"):
        Plan(_index([4]), 1, seed=0, micro_batch=4, bucket_weights={0: 0.0})


def test_ranks_that_divide_the_lanes_read_disjoint_row_groups() -> None:
    plan = Plan(_index([10] * 120), 120, seed=0, micro_batch=8, lanes=8)
    seen = [{plan.source(p).group for p in range(1200) if p % 4 == rank} for rank in range(4)]
    shared = sum(len(a & b) for a, b in itertools.combinations(seen, 2))
    assert shared <= 8  # only the groups that a lane's border cuts


def make_loader(folder: Path, **options) -> Loader:
    shards = open_shards(str(folder))
    buckets = options.pop("buckets", (VIDEO,))
    plan_options = {k: options.pop(k) for k in ("task_weights", "bucket_weights") if k in options}
    plan = Plan(
        index_shards(shards, buckets),
        len(shards.groups),
        seed=options.pop("seed", 0),
        micro_batch=options.pop("micro_batch", 4),
        **SMALL,
        **plan_options,
    )
    row_groups = RowGroups(shards, buckets, cache_bytes=options.pop("cache_bytes", 1 << 30))
    return Loader(plan, row_groups, select=lambda prompt, position: prompt, **options)


def take(loader: Loader, count: int) -> list:
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def test_epoch_yields_every_row_once(make_shards) -> None:
    folder = make_shards(40)
    ids = [i for b in take(make_loader(folder), 10) for i in b.clip_ids]
    assert len(set(ids)) == 40


def test_resumed_loader_equals_unbroken_loader(make_shards) -> None:
    folder = make_shards(30)
    whole = take(make_loader(folder), 12)
    rest = take(make_loader(folder, position=20), 7)
    for a, b in zip(whole[5:], rest, strict=True):
        assert a.clip_ids == b.clip_ids and a.positions == b.positions
        assert (a.video == b.video).all()


def test_small_cache_and_many_threads_change_nothing(make_shards) -> None:
    folder = make_shards(40)
    one = take(make_loader(folder, num_threads=1, prefetch_batches=1), 12)
    two = take(make_loader(folder, num_threads=4, prefetch_batches=8, cache_bytes=1), 12)
    assert [b.clip_ids for b in one] == [b.clip_ids for b in two]


def test_two_ranks_make_the_batches_of_one(make_shards) -> None:
    folder = make_shards(40)
    whole = take(make_loader(folder), 8)
    parts = [take(make_loader(folder, rank=r, world_size=2), 8) for r in range(2)]
    for one, left, right in zip(whole, *parts, strict=True):
        assert one.clip_ids[0::2] == left.clip_ids
        assert one.clip_ids[1::2] == right.clip_ids


def test_micro_batches_hold_one_bucket(make_shards, make_row) -> None:
    rows = [make_row(n, media="image" if n % 3 == 0 else "video") for n in range(36)]
    folder = make_shards(rows=rows)
    batches = take(make_loader(folder, buckets=(VIDEO, IMAGE), bucket_weights={0: 1.0, 1: 1.0}), 400)
    frames = [b.video.shape[1] for b in batches]
    assert set(frames) == {1, 8}
    assert 190 <= frames.count(1) <= 210 or 0.3 < frames.count(1) / 400 < 0.7
    assert all(b.fps.isinf().all() for b in batches if b.video.shape[1] == 1)


def test_task_weights_rule_the_mixture(make_shards, make_row) -> None:
    tasks = ["subject_driven", "video_prediction", "text_to_video"]
    folder = make_shards(rows=[make_row(n, task=tasks[n % 3]) for n in range(30)], job="instruct")
    weights = {"subject_driven": 3.0, "video_prediction": 1.0, "text_to_video": 0.0}
    loader = make_loader(folder, task_weights=weights)
    drawn = [t for b in take(loader, 250) for t in b.tasks]
    assert set(drawn) == {"subject_driven", "video_prediction"}
    assert drawn.count("subject_driven") == 750


def test_unreadable_target_is_replaced_and_counted(make_shards, make_row) -> None:
    rows = [make_row(n) for n in range(8)]
    rows[3]["target"]["data"] = b"short"
    loader = make_loader(make_shards(rows=rows))
    batches = take(loader, 4)
    assert all(len(b) == 4 for b in batches)
    assert loader.num_bad >= 1
    assert rows[3]["clip_id"] not in {i for b in batches for i in b.clip_ids}


def test_references_come_with_the_batch_and_a_bad_picture_is_a_bad_row(make_shards, make_row) -> None:
    rows = [make_row(n) for n in range(8)]
    rows[3]["segments"][1]["image"] = b"no picture"
    rows[4]["segments"] = rows[4]["segments"][-1:]  # no picture at all
    size = ReferenceSize(16, 24)
    shown = {"references": lambda prompt, stored: reference_tensors([prompt], size)}
    loader = make_loader(make_shards(rows=rows), **shown)
    batches = take(loader, 4)
    assert loader.num_bad >= 1 and rows[3]["clip_id"] not in {i for b in batches for i in b.clip_ids}
    assert any(rows[4]["clip_id"] in b.clip_ids for b in batches)
    for batch in batches:
        expected = reference_tensors(batch.prompts, size)
        assert batch.references is not None
        for name, part in vars(batch.references).items():
            assert torch.equal(part, getattr(expected, name))


def test_uncertified_shards_are_refused(make_shards) -> None:
    folder = make_shards(4)
    (folder / "certificate.json").unlink()
    with pytest.raises(ConfigError, match="no certified prompts"):
        open_shards(str(folder))


def test_missing_task_is_refused(make_shards) -> None:
    with pytest.raises(ConfigError, match=r"video_prediction.*legal: pretrain"):
        make_loader(make_shards(8), task_weights={"video_prediction": 1.0})


def test_key_depends_on_order() -> None:
    assert make_key(1, 2) != make_key(2, 1)
