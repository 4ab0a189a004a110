"""Laws of sampling: deterministic, every way to ask, one line for each refusal."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from infra.errors import ConfigError
from infra.storage import read_json
from model.sampling.generate import SampleConfig, check, run
from model.sampling.requests import describe_prompt, parse_prompt, requests_in_shards
from model.training.config import Stage1Config
from model.training.state import restore_generator


@pytest.fixture
def trained(trained_run: Stage1Config) -> Stage1Config:
    return trained_run


def values(trained: Stage1Config, out: Path, **changes: Any) -> SampleConfig:
    fields = {"run": trained.out, "out": str(out), "num_steps": 3, "fps": 8, "prompts": ["A red square."]}
    return SampleConfig.model_validate(fields | changes)


def test_same_command_gives_same_bytes(trained: Stage1Config, tmp_path: Path) -> None:
    for name in ("a", "b"):
        certificate = run(values(trained, tmp_path / name, seeds=[0, 1]))
    assert certificate.num_out == 2
    for file in ("sample-000.mp4", "sample-000.png", "sample-001.mp4", "samples.json"):
        one, two = (tmp_path / name / file for name in "ab")
        assert one.read_bytes() == two.read_bytes()
    entries = read_json(str(tmp_path / "a" / "samples.json"))["samples"]
    assert entries[0]["frames_sha256"] != entries[1]["frames_sha256"]
    assert run(values(trained, tmp_path / "a", seeds=[0, 1])) is not None  # found whole


def test_a_video_does_not_depend_on_its_company(trained: Stage1Config, tmp_path: Path) -> None:
    run(values(trained, tmp_path / "alone"))
    run(values(trained, tmp_path / "together", prompts=["A blue square.", "A red square."]))
    alone = read_json(str(tmp_path / "alone" / "samples.json"))["samples"][0]
    together = read_json(str(tmp_path / "together" / "samples.json"))["samples"][1]
    assert alone["frames_sha256"] == together["frames_sha256"]


def test_mp4_and_sheet_can_be_looked_at(trained: Stage1Config, tmp_path: Path) -> None:
    run(values(trained, tmp_path / "out"))
    with av.open(str(tmp_path / "out" / "sample-000.mp4")) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate or 0) == 8
    assert len(frames) == 4 and frames[0].shape == (240, 320, 3)
    assert Image.open(tmp_path / "out" / "sample-000.png").size[0] == 4 * 160 + 3 * 2


@pytest.mark.parametrize("scheme", ["none", "cfg", "retrieval", "alchemist", "phantom"])
def test_every_guidance_samples(trained: Stage1Config, tmp_path: Path, scheme: str) -> None:
    guidance = {"scheme": scheme, "weight": 2.0, "image_weight": 1.5}
    assert run(values(trained, tmp_path / scheme, guidance=guidance)).num_out == 1


def test_averages_sample_and_reconstruct(trained: Stage1Config, tmp_path: Path) -> None:
    averages = ("weights", "power-0.05", "power-0.07")
    for ema in averages:
        run(values(trained, tmp_path / ema, ema=ema))
    # Compared by their weights: the averages of so short a run may round to the same pixels.
    models = [restore_generator(trained.out, ema=ema, device=torch.device("cpu")).model for ema in averages]
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    assert not flat[0].equal(flat[1])
    assert not flat[1].equal(flat[2])
    with pytest.raises(ConfigError, match=r"ema 'best'.*legal: weights, half-life-.*power-0.1"):
        check(values(trained, tmp_path / "x", ema="best"))


def test_pictures_fill_the_placeholders(trained: Stage1Config, tmp_path: Path) -> None:
    for name in ("dog", "yard"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{name}.png")
    images = [str(tmp_path / "dog.png"), f"background:{tmp_path / 'yard.png'}"]
    text = "A <image> is playing in a <image>."
    prompt = parse_prompt(text, images, instruct=True)
    assert [(s.type, s.role) for s in prompt] == [
        ("text", "instruction"), ("text", "caption"), ("image", "subject"), ("text", "caption"),
        ("image", "background"), ("text", "caption"),
    ]  # fmt: skip
    assert describe_prompt(prompt).endswith("A <subject> is playing in a <background> .")
    assert run(values(trained, tmp_path / "out", prompts=[text], images=images)).num_out == 1
    with pytest.raises(ConfigError, match=r"2 <image> in .* and 1 images"):
        check(values(trained, tmp_path / "out2", prompts=[text], images=images[:1]))
    with pytest.raises(ConfigError, match="1 images too many"):
        check(values(trained, tmp_path / "out2", prompts=["None."], images=images[:1]))
    with pytest.raises(ConfigError, match="can't read image"):
        check(values(trained, tmp_path / "out2", prompts=["A <image>."], images=["nowhere.png"]))


def test_prompts_of_a_file(trained: Stage1Config, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "dog.png")
    lines: list[dict[str, Any]] = [
        {"prompt": "A <image> runs.", "images": ["dog.png"]},
        {"segments": [{"type": "text", "role": "caption", "text": "A dog runs."}]},
    ]
    place = tmp_path / "prompts.jsonl"
    place.write_text("\n".join(map(json.dumps, lines)))
    assert "2 videos of 4 frames" in check(
        values(trained, tmp_path / "out", prompts=[], prompts_file=str(place))
    )
    place.write_text('{"prompt": "fine"}\n{"images": []}\n')
    with pytest.raises(ConfigError, match="line 2"):
        check(values(trained, tmp_path / "out", prompts=[], prompts_file=str(place)))


def test_rows_of_shards_show_every_task(make_shards, make_row) -> None:
    tasks = ["subject_driven", "video_prediction", "text_to_video"]
    folder = make_shards(rows=[make_row(n, task=tasks[n % 3]) for n in range(12)], job="instruct")
    requests = requests_in_shards(str(folder), 3, fps=24.0, original_size_px=(288, 512))
    assert {r.task for r in requests} == set(tasks)
    assert requests[0].fps == 8.0 and requests[0].original_size_px == (24, 40)


def test_rows_of_shards_sample(trained: Stage1Config, tmp_path: Path) -> None:
    config = values(trained, tmp_path / "out", prompts=[], prompts_uri=trained.prompts, rows=1)
    assert run(config).num_out == 1
    entry = read_json(str(tmp_path / "out" / "samples.json"))["samples"][0]
    assert entry["task"] == "pretrain" and entry["prompt"].endswith("square moves to the right")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"run": "/nowhere"}, "no committed checkpoint at /nowhere"),
        ({"num_frames": 99}, "num_frames 99; legal: at most 4"),
        ({"prompts_file": "/nowhere.jsonl"}, "no prompts file"),
    ],
)
def test_preflight_refuses_in_one_line(
    trained: Stage1Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(values(trained, tmp_path / "out", **changes))
    assert "\n" not in str(caught.value)
