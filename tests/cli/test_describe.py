"""What a training with a pretrained backbone costs is told by its configs alone, at the published sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.describe import describe_training, fits, render
from infra.config import read_yaml
from model.training.config import Stage1Config
from tests.model.backbones.tiny_bases import diffusers

FOLDER = Path("infra/configs/cluster")
RECIPES = sorted([*FOLDER.glob("stage1_wan_*.yaml"), *FOLDER.glob("stage1_ltx*.yaml")])
SIZES: dict[str, dict[str, int]] = {
    "flat": {"num_attention_heads": 2, "num_layers": 2, "ffn_dim": 512},
    "1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
"""Of Wan 2.1, from the published configs, and of a flat one; the rest are the class's defaults."""


def outline(folder: Path, size: str) -> str:
    """A pipeline's folder with configs and no weights."""
    from transformers import UMT5Config

    with torch.device("meta"):
        transformer = diffusers.WanTransformer3DModel(**SIZES[size])
        autoencoder = diffusers.AutoencoderKLWan()
    text = UMT5Config(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
    text.architectures = ["UMT5EncoderModel"]
    for name, part in {"transformer": transformer, "vae": autoencoder, "text_encoder": text}.items():
        (folder / name).mkdir(parents=True)
        values = part.to_dict() if name == "text_encoder" else dict(part.config)
        if name != "text_encoder":
            values["_class_name"] = type(part).__name__
        (folder / name / "config.json").write_text(json.dumps(values, default=list))
    return str(folder)


def stage(model: str, **changes: Any) -> Stage1Config:
    backbone = {"kind": "diffusers", "model": model}
    values = {"prompts": "p", "out": "o", "num_frames": 33, "height_px": 480, "width_px": 832, "ema": []}
    parallel = {"dtype": "bfloat16", "recompute": True}
    return Stage1Config.model_validate({**values, "backbone": backbone, "parallel": parallel, **changes})


@pytest.mark.parametrize(
    ("size", "billions"), [("1.3B", 1.42), pytest.param("14B", 14.3, marks=pytest.mark.slow)]
)
def test_wan_is_counted_at_its_published_size_without_weights(
    tmp_path: Path, size: str, billions: float
) -> None:
    d = describe_training(stage(outline(tmp_path, size)))
    assert d["parameters"]["frozen"] / 1e9 == pytest.approx(billions, rel=0.01)
    assert d["parameters"]["trained"] < 0.05 * d["parameters"]["frozen"]
    assert d["latents"] == [9, 60, 104] and d["tokens"]["video"] == 9 * 30 * 52
    assert d["state"]["base"] == 2 * d["parameters"]["frozen"]
    assert d["parameters"]["text encoder (frozen)"] / 1e9 == pytest.approx(5.68, rel=0.01)
    assert (d["fits"][24] > 0) == (size == "1.3B") and d["fits"][141] > d["fits"][48] >= d["fits"][24]
    page = render(d, recompute=True)
    assert "on 24 GB" in page and "480 x 832" in page


def test_references_are_counted_as_frames_of_their_own(tmp_path: Path) -> None:
    model = outline(tmp_path, "flat")
    seen, unseen = (describe_training(stage(model, references=mode)) for mode in ("plus", "faithful"))
    assert seen["tokens"] == {**unseen["tokens"], "2 reference(s)": 2 * 30 * 52}
    for part in ("flops", "activations"):
        assert all(seen[part][name] > unseen[part][name] for name in seen[part] if unseen[part][name])
    assert seen["flops"]["forward"] > 11 / 9 * unseen["flops"]["forward"] * 0.9


def test_a_gpu_fits_what_its_memory_divides_into() -> None:
    acts = [{"stored": 3 * 10**9}, {"stored": 5 * 10**9}]
    assert fits(24, 10 * 10**9, acts, recompute=False) == 1 + int((24 * 0.9 - 10 - 3) // 2)
    assert fits(24, 19 * 10**9, acts, recompute=False) == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_configs_of_pretrained_backbones_that_say_where_numbers_come_from(recipe: Path) -> None:
    config = Stage1Config.load(recipe)
    assert config.pretrained is not None and config.autoencoder == config.pretrained.model
    assert config.prompts.endswith("prompts-video")  # not those that hold frames of 36 x 64
    assert config.num_frames % 4 == 1 and config.height_px % 32 == config.width_px % 32 == 0
    assert config.batch_size % (config.accumulation * (config.num_workers or 1)) == 0  # pyright: ignore
    assert "ours" in recipe.read_text() and read_yaml(recipe)["backbone"]["kind"] == "diffusers"
