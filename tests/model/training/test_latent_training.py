"""Laws of training in latent space: one switch, everything follows, films come out in pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from infra.errors import ConfigError, TrainingError
from infra.storage import read_json
from model.data.shards import open_shards
from model.edm import sigma_in
from model.latents import load_latents
from model.sampling.export import ExportConfig, load_exported
from model.sampling.export import run as export
from model.sampling.generate import run as sample
from model.sampling.plan import SampleConfig
from model.training.config import Stage1Config, Stage2Config
from model.training.driver import check
from model.training.loop import Training
from model.training.preflight import prepare_index, read_index

Values = Callable[..., dict[str, Any]]
SIZES = {
    # pixels t h w -> latents t c h w
    "image": ((4, 12, 16), (4, 4, 3, 4)),
    "video": ((5, 16, 24), (2, 3, 2, 3)),
}


@pytest.fixture(params=["image", "video"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def latent_values(stage_values: Values, make_shards, autoencoders, kind: str) -> Values:
    """Values of a stage 1 in the latents of an image or a video autoencoder, pictures mixed in."""

    def make(**changes: Any) -> dict[str, Any]:
        (frames, height, width), _ = SIZES[kind]
        shards = make_shards(22, num_frames=frames, height=height, width=width, name=f"prompts-{kind}")
        values = stage_values(
            prompts=str(shards),
            num_frames=frames,
            height_px=height,
            width_px=width,
            autoencoder=autoencoders[kind],
        )
        return values | {"backbone": {**values["backbone"], "patch_px": 1}} | changes

    return make


def open_training(config: Stage1Config | Stage2Config) -> Training:
    prepare_index(config, open_shards(config.prompts))
    return Training(config, read_index(config.out))


@pytest.fixture
def trained(latent_values: Values) -> Stage1Config:
    config = Stage1Config.model_validate(latent_values())
    training = open_training(config)
    training.step()
    training.save({})
    training.close()
    return config


def test_shapes_channels_and_sigma_in_follow_the_autoencoder(latent_values: Values, kind: str) -> None:
    config = Stage1Config.model_validate(latent_values())
    (frames, height, width), (t, c, h, w) = SIZES[kind]
    training = open_training(config)
    backbone = training.model.backbone_config
    assert (backbone.num_frames, backbone.in_channels, backbone.out_channels) == (t, c, c)
    assert (backbone.height_px, backbone.width_px) == (h, w)
    batch = next(training.batches)
    assert batch.video.shape[1:] == (frames, 3, height, width)
    x = training.targets(batch)
    assert x.shape[1:] == (t, c, h, w)
    assert training.targets.objective(x).sigma_in == pytest.approx(sigma_in(t, h, w))
    training.close()
    assert f"sigma_in {sigma_in(t, h, w):g}" in check(config)


def test_latents_of_a_clip_do_not_depend_on_its_batch(latent_values: Values) -> None:
    training = open_training(Stage1Config.model_validate(latent_values()))
    batch = next(training.batches)
    together = training.targets(batch)
    assert training.targets.latents is not None
    alone = training.targets.latents.encode(batch.target(training.device)[2:3])
    assert together[2:3].equal(alone)
    training.close()


def test_references_are_latents_of_their_own_size_whatever_they_stand_beside(
    latent_values: Values, kind: str
) -> None:
    training = open_training(Stage1Config.model_validate(latent_values(reference_size_px=[32, 48])))
    batch, latents = next(training.batches), training.targets.latents
    assert batch.references is not None and latents is not None
    condition = training.condition(
        batch.prompts, batch.fps, batch.original_size_px, batch.encoded, batch.references
    )
    seen, present = condition.references, condition.reference_mask
    factor, channels = latents.space.factor_px, latents.space.channels
    assert seen is not None and present is not None and present.any()
    assert seen.shape[2:] == (channels, 32 // factor, 48 // factor)
    for row, number in present.nonzero().tolist():
        pixels = batch.references.pictures[row, number].float() / 127.5 - 1.0
        assert torch.equal(seen[row, number], latents.encode(pixels[None, None])[0, 0])
    assert not seen[~present].any()
    assert training.model.condition_config.reference_patch == max(1, 8 // factor)
    training.step()
    training.close()


def test_resumed_training_in_latents_equals_unbroken(latent_values: Values, tmp_path: Path) -> None:
    whole = open_training(Stage1Config.model_validate(latent_values(out=str(tmp_path / "whole"))))
    for _ in range(3):
        whole.step()
    config = Stage1Config.model_validate(latent_values(out=str(tmp_path / "parts")))
    for steps in (1, 2):
        training = open_training(config)
        for _ in range(steps):
            training.step()
        training.save({})
        training.close()
    assert training.weights_sha256() == whole.weights_sha256()
    whole.close()


def test_films_are_pixels_and_the_same_each_time(trained: Stage1Config, tmp_path: Path, kind: str) -> None:
    hashes = []
    for name in "ab":
        config = SampleConfig(
            run=trained.out, out=str(tmp_path / name), prompts=("A red square.",), num_steps=2, fps=8
        )
        assert sample(config).num_out == 1
        hashes.append(read_json(f"{config.out}/samples.json")["samples"][0]["frames_sha256"])
    assert hashes[0] == hashes[1]
    frames, height, width = SIZES[kind][0]
    with av.open(str(tmp_path / "a" / "sample-000.mp4")) as container:
        shown = [f.to_ndarray(format="rgb24").shape for f in container.decode(video=0)]
    assert len(shown) == frames and shown[0][0] * width == shown[0][1] * height


def test_export_of_latents_says_which_autoencoder(trained: Stage1Config, tmp_path: Path) -> None:
    export(ExportConfig(run=trained.out, out=str(tmp_path / "export")))
    backbone = load_exported(str(tmp_path / "export")).backbone_config
    assert backbone.out_channels == SIZES_CHANNELS[trained.num_frames]
    space = read_json(str(tmp_path / "export" / "config.json"))["space"]
    assert space == vars(load_latents(trained.autoencoder or "").space)


SIZES_CHANNELS = {pixels[0]: latents[1] for pixels, latents in SIZES.values()}


def test_another_autoencoder_in_its_place_is_refused(
    trained: Stage1Config, autoencoders, tmp_path: Path, kind: str
) -> None:
    other = load_latents(autoencoders[kind]).model
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    other.save_pretrained(tmp_path / "other")
    moved = str(tmp_path / "other")
    config = trained.model_copy(update={"autoencoder": moved})
    with pytest.raises(TrainingError, match="was trained in latents of autoencoder"):
        open_training(config)
    values = trained.model_dump() | {"autoencoder": moved, "out": str(tmp_path / "two")}
    two = Stage2Config.model_validate(values | {"start_from": trained.out, "tasks": None})
    with pytest.raises(ConfigError, match=r"autoencoder: .* there"):
        check(two)


def test_sizes_that_do_not_divide_are_refused_at_the_door(latent_values: Values) -> None:
    with pytest.raises(ConfigError, match="multiples of"):
        check(Stage1Config.model_validate(latent_values(width_px=18)))
    with pytest.raises(ConfigError, match="26 x 26 pixels don't divide"):
        check(Stage1Config.model_validate(latent_values(reference_size_px=[26, 26], reference_patch_px=13)))
    with pytest.raises(ConfigError, match="can't read the autoencoder"):
        missing = latent_values()["prompts"]
        check(Stage1Config.model_validate(latent_values(autoencoder=missing)))


def test_pictures_of_one_frame_have_their_own_sigma_in(
    stage_values: Values, make_shards, make_row, autoencoders
) -> None:
    rows = [
        make_row(n, media="image" if n % 2 else "video", num_frames=4, height=12, width=16) for n in range(16)
    ]
    shared = {"prompts": str(make_shards(rows=rows, name="mixed")), "batch_size": 2}
    buckets = [{"media": "video"}, {"media": "image"}]
    values = stage_values(**shared, buckets=buckets, autoencoder=autoencoders["image"])
    values["backbone"] = {**values["backbone"], "patch_px": 1}
    training = open_training(Stage1Config.model_validate(values))
    found = {}
    for _ in range(8):
        batch = next(training.batches)
        x = training.targets(batch)
        found[x.shape[1]] = training.targets.objective(x).sigma_in
    assert found == {4: sigma_in(4, 3, 4), 1: sigma_in(1, 3, 4)} and found[4] == 2 * found[1]
    training.step()
    training.close()
