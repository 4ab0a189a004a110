"""A pretrained model is sampled as it is, before any training: what stock diffusers makes of it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli.train import app
from infra.errors import ConfigError
from infra.storage import read_json
from model.backbones.folder import read_base
from model.sampling import generate
from model.sampling.plan import SampleConfig, check
from model.step import sample_generator
from model.training.config import Stage1Config
from tests.model.backbones.tiny_bases import diffusers
from tests.model.runs import open_training

WORDS, STEPS = "a dog runs on grass", 3
SIZE = {"num_frames": 5, "size_px": (32, 48), "num_steps": STEPS, "fps": 8}


def values(out: Path, **changes: Any) -> SampleConfig:
    return SampleConfig.model_validate({"out": str(out), "prompts": [WORDS], **SIZE, **changes})


def frames_of(folder: Path) -> list[str]:
    return [entry["frames_sha256"] for entry in read_json(str(folder / "samples.json"))["samples"]]


def test_a_base_model_makes_what_its_stock_pipeline_makes(folder: str, tmp_path: Path) -> None:
    """From the same noise, by Euler's steps, with the guidance that is the pipeline's own."""
    config = values(tmp_path / "out", base=folder, num_frames=9, size_px=(32, 64), fps=25)
    sampler = generate.Sampler(config, folder)
    ours = sampler.videos(generate.plan_videos(config, generate.made_by(config)[1]))
    latents = sampler.base.space.shape(9, 32, 64)
    noise = torch.randn(1, *latents, generator=sample_generator(0, 0, "noise", "cpu")).transpose(1, 2)
    base = read_base(folder)
    pipe = getattr(diffusers, base.family.pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if base.scheduler["_class_name"].startswith("UniPC"):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=base.scheduler["flow_shift"])
    if base.family.pipeline == "LTXPipeline":
        noise = pipe._pack_latents(noise)
    size = {"num_frames": 9, "height": 32, "width": 64, "num_inference_steps": STEPS}
    theirs = pipe(WORDS, latents=noise, output_type="pt", **size).frames
    assert torch.allclose(ours, 2 * theirs - 1, atol=1e-4)


def test_before_its_first_step_a_run_makes_what_its_base_makes(
    base_values: Callable[..., dict[str, Any]], wan: str, tmp_path: Path
) -> None:
    training = open_training(Stage1Config.model_validate(base_values(text="native", references="faithful")))
    training.save({})
    training.close()
    alike = {"guidance": {"weight": 3}, "prompts": [WORDS, "a cat"]}
    base = values(tmp_path / "base", base=wan, **alike)
    assert check(base).startswith("2 videos of 5 frames") and not (tmp_path / "base").exists()
    generate.run(base)
    generate.run(values(tmp_path / "of_run", run=str(tmp_path / "run"), **alike))
    made = frames_of(tmp_path / "base")
    assert made == frames_of(tmp_path / "of_run") and made[0] != made[1]
    written = (tmp_path / "base" / "sample-000.png").stat().st_mtime_ns
    assert generate.run(base).num_out == 2  # found whole
    assert (tmp_path / "base" / "sample-000.png").stat().st_mtime_ns == written
    shutil.copytree(wan, tmp_path / "copy")
    spoilt = tmp_path / "copy/transformer/config.json"
    spoilt.write_text(spoilt.read_text() + "\n")
    with pytest.raises(ConfigError, match="holds the output of another sample run"):
        generate.run(values(tmp_path / "base", base=str(tmp_path / "copy"), **alike))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"run": "somewhere"}, "a run and a base model; legal: a run's folder, or --base"),
    "average": ({"ema": "power-0.05"}, "legal: weights"),
    "size": ({"size_px": (40, 48)}, "legal: multiples of 16 x 16"),
    "documents": ({"documents": "shuffled"}, "documents shuffled"),
    "no model": ({"base": "nowhere/at-all"}, "cure: give a folder or hub id of a pipeline of diffusers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_base_model_cannot_have_is_a_line(wan: str, tmp_path: Path, name: str) -> None:
    changes, says = REFUSED[name]
    options = {"base": wan, "out": str(tmp_path), "prompts": [WORDS], **SIZE, **changes}
    with pytest.raises(ConfigError) as caught:
        check(SampleConfig.load(options=options))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_pictures_mean_nothing_to_it(wan: str, tmp_path: Path) -> None:
    picture = tmp_path / "dog.png"
    Image.new("RGB", (8, 8)).save(picture)
    with pytest.raises(ConfigError, match="legal: words"):
        check(values(tmp_path, base=wan, prompts=["A <image> runs"], images=[str(picture)]))


def test_the_command_takes_its_first_word_for_a_prompt(wan: str, tmp_path: Path) -> None:
    words = ["sample", "--base", wan, "a dog", "a cat", "--out", str(tmp_path / "out"), "--dry-run"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "# 2 videos of 81 frames" in found.output and "num_steps: 50" in found.output
    assert not (tmp_path / "out").exists()
