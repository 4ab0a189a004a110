"""What is exported of a pretrained backbone is loaded by stock diffusers, in a process without our code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from model.backbones.pretrained import PretrainedGenerator
from model.condition import Segment
from model.sample import sample_ode
from model.sampling.export import ExportConfig, load_exported, named_weights, run
from model.sampling.maker import GuidanceConfig, Maker, open_maker
from model.sampling.requests import SampleRequest
from model.sampling.stock import sorted_metadata
from model.training.config import Stage1Config
from model.training.state import restore_generator
from tests.model.backbones.tiny_bases import SAVERS, save_wan
from tests.model.runs import advance, open_training

WORDS, STEPS = "a dog runs on grass", 3
STOCK = """
import sys, torch
sys.modules.update(dict.fromkeys(("model", "infra", "pipeline", "cli")))
from diffusers import DiffusionPipeline
folder, noise, out, has_lora = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
assert type(pipe).__module__.startswith("diffusers.")
if has_lora == "True":
    pipe.load_lora_weights(folder)
pipe.set_progress_bar_config(disable=True)
if type(pipe.scheduler).__name__.startswith("UniPC"):
    from diffusers import FlowMatchEulerDiscreteScheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
latents = torch.load(noise).transpose(1, 2)
sides = latents.shape[2:]
packs = hasattr(pipe, "_pack_latents")
made = pipe(
    "{words}", num_frames=9, height=32, width=64, num_inference_steps={steps}, guidance_scale=3.0,
    latents=pipe._pack_latents(latents) if packs else latents, output_type="latent",
).frames
torch.save((pipe._unpack_latents(made, *sides) if packs else made).transpose(1, 2), out)
"""


def trained(values: dict[str, Any]) -> Stage1Config:
    config = Stage1Config.model_validate(values)
    training = open_training(config)
    advance(training, 3)
    training.save({})
    training.close()
    return config


def our_latents(maker: Maker, noise: torch.Tensor) -> torch.Tensor:
    request = SampleRequest((Segment("text", "caption", text=WORDS),), 25.0, (32, 64))
    denoiser = maker._denoiser([request], tuple(noise.shape[1:]))
    return sample_ode(denoiser, denoiser.objective, noise, num_steps=STEPS)


SMALL = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize(
    ("family", "lora", "noise_of"),
    [
        *((family, SMALL, {}) for family in sorted(SAVERS)),
        pytest.param("LTXVideoTransformer3DModel", SMALL, {"shift": 5.0}, id="LTX with a shift of its own"),
        pytest.param("WanTransformer3DModel", None, {}, marks=pytest.mark.slow),
    ],
)
def test_stock_diffusers_makes_our_latents_of_an_export(
    base_values: Callable[..., dict[str, Any]],
    save_base: Callable[[str], str],
    tmp_path: Path,
    family: str,
    lora: dict[str, Any] | None,
    noise_of: dict[str, float],
) -> None:
    more: dict[str, Any] = {"noise": noise_of} if noise_of else {}
    more |= {"references": "faithful", "optim": {"name": "adamw", "lr": 0.05}, "num_frames": 9, "width_px": 64}
    config = trained(base_values(model=save_base(family), text="native", lora=lora, **more))
    run(ExportConfig(run=config.out, out=str(tmp_path / "export")))
    restored = restore_generator(config.out, device=torch.device("cpu"))
    maker = open_maker(restored, GuidanceConfig(weight=3.0))
    shape = restored.space.shape(9, 32, 64)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    ours = our_latents(maker, noise)
    torch.save(noise, tmp_path / "noise.pt")
    code = STOCK.replace("{words}", WORDS).replace("{steps}", str(STEPS))
    words = [
        str(tmp_path / "export"),
        str(tmp_path / "noise.pt"),
        str(tmp_path / "out.pt"),
        str(lora is not None),
    ]
    subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=tmp_path, env=environment())
    theirs = torch.load(tmp_path / "out.pt")
    assert torch.allclose(ours, theirs, atol=1e-4)
    if lora is not None and isinstance(restored.model, PretrainedGenerator):
        restored.model.backbone.disable_adapters()  # pyright: ignore[reportCallIssue]
        assert not torch.allclose(our_latents(maker, noise), theirs, atol=1e-2)


def environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_an_export_is_read_back_wherever_it_lies(
    base_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The base in the folder is taken; without one the training's. What its index doesn't name stays behind."""
    base = save_wan(tmp_path / "base")
    for beside in ("whole.safetensors", "assets/dog.mp4", "unet/config.json"):
        (tmp_path / "base" / beside).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / beside).write_text("{}")
    config = trained(base_values(model=base, text="append"))
    certificate = run(ExportConfig(run=config.out, out=str(tmp_path / "export")))
    names = {file.path for file in certificate.files}
    assert {"model_index.json", "pytorch_lora_weights.safetensors", "vimi/model.safetensors"} < names
    parts = {"transformer", "scheduler", "vae", "text_encoder", "tokenizer", "vimi"}
    assert {name.partition("/")[0] for name in names if "/" in name} == parts
    assert {name for name in names if "/" not in name} == {
        "model_index.json",
        "pytorch_lora_weights.safetensors",
    }
    moved = (tmp_path / "export").rename(tmp_path / "moved")
    model = load_exported(str(moved))
    assert isinstance(model, PretrainedGenerator) and model.backbone_config.model == str(moved)
    there = named_weights(restore_generator(config.out, device=torch.device("cpu")).model)
    assert there.keys() == named_weights(model).keys()
    assert all(value.equal(named_weights(model)[name]) for name, value in there.items())
    bare = run(ExportConfig(run=config.out, out=str(tmp_path / "bare"), base=False))
    assert {file.path for file in bare.files} == {
        "pytorch_lora_weights.safetensors", "vimi/model.safetensors", "vimi/config.json",
    }  # fmt: skip
    said = json.loads((tmp_path / "bare/vimi/config.json").read_text())
    assert said["base"] and said["config"]["backbone"]["kind"] == "diffusers"


def test_a_tensor_file_has_the_same_bytes_each_time() -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    files = [save(tensors, metadata={"format": "pt", "made": "{}", "by": "é"}) for _ in range(8)]
    (one,) = {sorted_metadata(data) for data in files}
    found = load(one)
    assert found.keys() == tensors.keys() and all(found[name].equal(tensors[name]) for name in tensors)
