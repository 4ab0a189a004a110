"""Laws of buckets: resolution x frames x kind, one of them a micro-batch, the same on all ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
from pydantic import ValidationError

from infra.errors import ConfigError
from model.condition import Condition
from model.cost import training_flops
from model.data.buckets import Bucket, nearest_bucket
from model.data.shards import open_shards
from model.edm import sigma_in
from model.sampling.generate import run as sample
from model.sampling.plan import SampleConfig
from model.sampling.plan import check as check_sample
from model.training.build import heaviest_batch
from model.training.config import Stage1Config
from model.training.loop import Training
from model.training.preflight import prepare_index, read_index
from model.training.validation.loss import Validation

Values = Callable[..., dict[str, Any]]
BUCKETS = [
    {"media": "video"},  # 4 x 12 x 16
    {"media": "video", "height_px": 16, "width_px": 12},
    {"media": "video", "num_frames": 2},
    {"media": "image"},
]
SHAPES = {(4, 12, 16), (4, 16, 12), (2, 12, 16), (1, 12, 16)}


@pytest.fixture
def mixed(stage_values: Values, make_shards, make_row) -> dict[str, Any]:
    """Values of a run over wide, tall and short videos and pictures, six of each."""
    kinds: list[dict[str, Any]] = [
        {"num_frames": 4, "height": 12, "width": 16},
        {"num_frames": 4, "height": 16, "width": 12},
        {"num_frames": 3, "height": 12, "width": 16},
        {"media": "image", "height": 12, "width": 16},
    ]
    rows = [make_row(n, **kinds[n % 4]) for n in range(24)]
    return stage_values(
        prompts=str(make_shards(rows=rows, name="mixed")), buckets=BUCKETS, batch_size=2, samples=80
    )


def open_training(values: dict[str, Any]) -> Training:
    config = Stage1Config.model_validate(values)
    prepare_index(config, open_shards(config.prompts))
    return Training(config, read_index(config.out))


def test_rows_go_to_the_nearest_shape_then_size_then_length() -> None:
    buckets = (
        Bucket("video", 16, 36, 64), Bucket("video", 4, 36, 64), Bucket("video", 16, 72, 128),
        Bucket("video", 16, 64, 36), Bucket("image", 1, 36, 64),
    )  # fmt: skip
    rows: list[tuple[str, int, int, int | None, int]] = [
        ("video", 36, 64, 16, 0), ("video", 36, 64, 15, 1), ("video", 36, 64, 3, 1), ("video", 36, 64, None, 0),
        ("video", 720, 1280, 16, 2), ("video", 72, 128, 4, 2), ("video", 18, 32, 30, 0),
        ("video", 1280, 720, 99, 3), ("image", 1280, 720, 1, 4),
    ]  # fmt: skip
    for media, height, width, frames, expected in rows:
        assert nearest_bucket(media, height, width, buckets, num_frames=frames) == expected
    assert nearest_bucket("video", 36, 64, buckets[4:]) is None


def test_every_micro_batch_is_one_bucket_with_its_own_sigma_in_on_all_ranks(mixed: dict[str, Any]) -> None:
    training = open_training(mixed)
    plan, found = training.loader.plan, {}
    for number in range(24):  # shares are exact over 1,000 draws, so a few more than four
        positions = range(2 * number, 2 * number + 2)
        assert len({plan.source(p).bucket for p in positions}) == 1
        batch = next(training.batches)
        assert batch.positions == list(positions)
        x = training.targets(batch)
        found[tuple(x.shape[i] for i in (1, 3, 4))] = training.targets.objective(x).sigma_in
    assert found == {shape: sigma_in(*shape) for shape in SHAPES}
    training.close()


def test_mixed_buckets_train_validate_and_are_counted_at_their_own_cost(mixed: dict[str, Any]) -> None:
    training = open_training(mixed | {"validation": {"num_samples": 1}})
    for _ in range(24):
        assert training.step().loss.isfinite()
    assert set(training.seen) == SHAPES and training.seen.total() == 48
    backbone, condition = training.model.backbone_config, training.model.condition_config

    def cost(t: int, h: int, w: int) -> int:
        return training_flops(backbone, condition, prompt_tokens=8, shape=(t, h, w))["total"]

    assert cost(1, 12, 16) < cost(2, 12, 16) < cost(4, 12, 16)
    record = Validation(training, read_index(training.config.out)).run()
    assert {"val/video documents right", "val/image documents none"} <= set(record)
    training.close()


def heaviest(training: Training) -> Condition:
    space = training.targets.space
    return heaviest_batch(training.config, 1, encoder=training.encoder, space=space, has_latents=False)[1]


def test_the_largest_bucket_is_rehearsed_and_leaves_no_trace(mixed: dict[str, Any], tmp_path: Path) -> None:
    hashes = []
    for name in ("with", "without"):
        training = open_training(mixed | {"out": str(tmp_path / name), "references": "plus"})
        if name == "with":
            training.rehearse()
            seen = heaviest(training).references
            assert seen is not None and seen.shape[1] == max(training.config.documents)
            assert not training.seen
        for _ in range(2):
            training.step()
        hashes.append(training.weights_sha256())
        training.close()
    assert hashes[0] == hashes[1]


def test_videos_are_sampled_at_a_buckets_size_and_at_no_other(mixed: dict[str, Any], tmp_path: Path) -> None:
    training = open_training(mixed)
    training.save({})
    training.close()
    values = {"run": mixed["out"], "out": str(tmp_path / "out"), "prompts": ["A square."], "num_steps": 1}
    for name, size in (("tall", [16, 12]), ("wide", [12, 16]), ("main", None)):
        out = tmp_path / name
        assert sample(SampleConfig.model_validate(values | {"size_px": size, "out": str(out)})).num_out == 1
        with av.open(str(out / "sample-000.mp4")) as container:
            stream = container.streams.video[0]
            assert stream.height * (12 if name == "tall" else 16) == stream.width * (
                16 if name == "tall" else 12
            )
    with pytest.raises(ConfigError, match=r"size_px \[20, 12\]; legal: \[12, 16\] or \[16, 12\]"):
        check_sample(SampleConfig.model_validate(values | {"size_px": [20, 12]}))


def test_a_bucket_twice_is_refused(mixed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="each of another medium, length or size"):
        Stage1Config.model_validate(mixed | {"buckets": [{"media": "video"}, {"media": "video"}]})
