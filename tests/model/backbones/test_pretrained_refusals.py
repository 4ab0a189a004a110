"""What can't work with a pretrained backbone is refused before Ray starts, in a line with what is legal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import ConfigError, TrainingError
from model.backbones.folder import base_sha256
from model.backbones.pretrained import Pretrained
from model.training.config import Stage1Config, Stage2Config
from model.training.driver import check
from model.training.preflight import inspect
from model.training.state import restore_generator
from tests.model.backbones.tiny_bases import save_ltx, save_wan
from tests.model.runs import advance, open_training

Values = Callable[..., dict[str, Any]]


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)


def quantise(folder: Path) -> None:
    rewrite(folder / "transformer/config.json", quantization_config={"quant_method": "bitsandbytes"})


def weights(folder: Path) -> Path:
    return next((folder / "transformer").glob("*.safetensors"))


def no_weights(folder: Path) -> None:
    weights(folder).unlink()


def cut_weights(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-64])


def weights_of_one_block(folder: Path) -> None:
    """As after a download of some of a model's files: diffusers would draw the others at random."""
    tensors = load_file(weights(folder))
    save_file({name: v for name, v in tensors.items() if not name.startswith("blocks.1.")}, weights(folder))


def other_sizes(folder: Path) -> None:
    rewrite(folder / "transformer/config.json", ffn_dim=48)


def missing_shard(folder: Path) -> None:
    names = dict.fromkeys(load_file(weights(folder)), "diffusion_pytorch_model-00001-of-00002.safetensors")
    path = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": names}))


def no_sizes(folder: Path) -> None:
    (folder / "transformer/config.json").write_text('{"_class_name": "WanTransformer3DModel"}')


def empty(folder: Path, part: str) -> None:
    without(folder, part)
    (folder / part).mkdir()


SPOILT: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "nothing": (shutil.rmtree, {}, "cure: give a folder or hub id of a pipeline of diffusers"),
    "folder": (lambda f: without(f, "transformer"), {}, "holds no transformer/config.json"),
    "class": (
        lambda f: rewrite(f / "transformer/config.json", _class_name="MochiTransformer3DModel"), {},
        "is a MochiTransformer3DModel; legal: WanTransformer3DModel, LTXVideoTransformer3DModel",
    ),
    "quantised": (quantise, {}, "is quantised (bitsandbytes)"),
    "image to video": (
        lambda f: rewrite(f / "transformer/config.json", image_dim=1280), {}, "an image-to-video model",
    ),
    "two experts": (lambda f: rewrite(f / "model_index.json", boundary_ratio=0.875), {}, "two experts"),
    "autoencoder": (lambda f: without(f, "vae"), {}, "can't read the autoencoder"),
    "text encoder": (lambda f: without(f, "text_encoder"), {}, "holds no text_encoder"),
    "tokenizer": (lambda f: empty(f, "tokenizer"), {}, "holds no tokenizer"),
    "weights": (no_weights, {}, "weights can't be read"),
    "cut weights": (cut_weights, {}, "weights can't be read"),
    "missing shard": (missing_shard, {}, "weights can't be read"),
    "half the weights": (weights_of_one_block, {}, "27 of 69 tensors of its transformer are missing"),
    "other sizes": (other_sizes, {}, "of another shape, blocks.0.ffn"),
    "thick patches": (
        lambda f: rewrite(f / "transformer/config.json", patch_size=[2, 2, 2]), {}, "of several latent frames",
    ),
    "no sizes": (no_sizes, {}, "says nothing of 'in_channels'"),
    "size": (lambda f: None, {"height_px": 40}, "legal: multiples of 16 x 16"),
    "targets": (lambda f: None, {"lora": {"targets": ["to_q", "nope"]}}, "'nope': no linear layer"),
    "tokens": (lambda f: None, {"encoder": {"max_tokens": 600}}, "legal: at most 384"),
    "elastic": (
        lambda f: None, {"parallel": {"mode": "fsdp"}, "num_workers": (1, 2)}, "legal: a fixed number",
    ),
    "noise": (lambda f: None, {"noise": {"sigma_data": 0.5}}, "legal: shift, mean, std"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_with_a_base_is_a_line(base_values: Values, wan: str, tmp_path: Path, name: str) -> None:
    spoil, changes, says = SPOILT[name]
    folder = tmp_path / "spoilt"
    shutil.copytree(wan, folder)
    spoil(folder)
    values = base_values(model=str(folder), **{k: v for k, v in changes.items() if k != "encoder"})
    values["encoder"] = {**values["encoder"], **changes.get("encoder", {})}
    with pytest.raises(ConfigError) as caught:
        check(Stage1Config.model_validate(values))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_references_of_another_size_than_the_videos_are_refused(base_values: Values) -> None:
    """They are frames of one transformer."""
    with pytest.raises(
        ConfigError, match=r"reference_size_px \[224, 224\].*legal: \[32, 48\], the size of"
    ) as one:
        Stage1Config.load(options=base_values(reference_size_px=[224, 224]))
    assert "\n" not in str(one.value)
    assert Stage1Config.load(options=base_values(reference_size_px=[32, 48])).reference_size_px == (32, 48)


@pytest.fixture
def uncached(wan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub id of which the configs alone are here, and no network."""
    place = tmp_path / "hub/models--someone--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    shutil.copytree(wan, place / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return "someone/tiny"


def test_a_dry_run_fetches_no_weights(base_values: Values, uncached: str) -> None:
    config = Stage1Config.model_validate(base_values(model=uncached))
    assert f"latents of autoencoder {uncached}: 2 x 3 x 4 x 6" in check(config)
    with pytest.raises(ConfigError, match="can't load the autoencoder 'someone/tiny'"):
        inspect(config)


def test_a_download_that_breaks_off_is_a_line(uncached: str) -> None:
    with pytest.raises(
        ConfigError, match=r"can't fetch backbone.model nobody/nothing: .*; cure: the same"
    ) as one:
        base_sha256("nobody/nothing")
    assert "\n" not in str(one.value)


def test_an_ltx_that_tells_places_otherwise_is_refused(base_values: Values, tmp_path: Path) -> None:
    """Since 0.9.5 it counts frames from the first one's end, and its times are spread otherwise."""
    model = save_ltx(tmp_path / "ltx")
    rewrite(tmp_path / "ltx/model_index.json", _class_name="LTXConditionPipeline")
    with pytest.raises(ConfigError, match="of a LTXConditionPipeline"):
        check(Stage1Config.model_validate(base_values(model=model, num_frames=9, text="replace")))


def test_a_base_that_lacks_weights_is_not_filled_with_random_ones(
    base_values: Values, wan: str, tmp_path: Path
) -> None:
    """Also where nobody looked at its files before: one that a hub gave."""
    folder = tmp_path / "spoilt"
    shutil.copytree(wan, folder)
    weights_of_one_block(folder)
    backbone = Pretrained(model=str(folder), family="WanTransformer3DModel")
    with pytest.raises(ValueError, match=r"holds no weights of blocks\.1"):
        backbone.build()


def test_a_text_that_is_masked_has_no_room_behind_it(base_values: Values, tmp_path: Path) -> None:
    values = base_values(model=save_ltx(tmp_path / "ltx"), num_frames=9)
    values["encoder"]["max_tokens"] = 256
    with pytest.raises(ConfigError, match="legal: replace or native"):
        check(Stage1Config.model_validate(values))


def test_another_base_than_a_run_was_trained_on_is_refused(base_values: Values, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    config = Stage1Config.model_validate(base_values(model=save_wan(folder)))
    assert inspect(config).inputs["base"]
    training = open_training(config)
    advance(training, 1)
    training.save({})
    training.close()
    save_wan(tmp_path / "other", seed=1)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(tmp_path / "other/transformer", folder / "transformer")
    cpu = torch.device("cpu")
    for again in (lambda: open_training(config), lambda: restore_generator(config.out, device=cpu)):
        with pytest.raises(TrainingError, match="base model of other weights"):
            again()


def test_stage_2_goes_on_from_a_pretrained_run(base_values: Values, make_shards: Any, tmp_path: Path) -> None:
    values = base_values()
    first = open_training(Stage1Config.model_validate(values))
    advance(first, 2)
    first.save({})
    first.close()
    prompts = make_shards(
        12, name="instructions", job="instruct", task="video_prediction", num_frames=5, height=32, width=48
    )
    more = {
        "prompts": str(prompts),
        "start_from": values["out"],
        "out": str(tmp_path / "second"),
        "tasks": None,
    }
    config = Stage2Config.model_validate({**values, **more})
    assert "starts from" in check(config)
    second = open_training(config)
    assert second.weights_sha256() == first.weights_sha256()
    advance(second, 1)
    assert second.weights_sha256() != first.weights_sha256()
    second.close()
