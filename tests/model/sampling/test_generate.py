"""Laws of sampling: deterministic, every way to ask, one line for each refusal."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from infra.errors import ConfigError
from infra.storage import read_json
from model.prompt.select import documents, retrieved
from model.sampling.documents import choose_documents, with_found
from model.sampling.generate import Sampler, run
from model.sampling.plan import SampleConfig, check, plan_videos
from model.sampling.requests import (
    SampleRequest,
    describe_prompt,
    parse_prompt,
    prompts_in_file,
    requests_in_shards,
)
from model.training.checkpoint import find_checkpoint
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
    certificate = run(values(trained, tmp_path / "out", prompts=[text], images=images))
    (entry,) = read_json(str(tmp_path / "out" / "samples.json"))["samples"]
    kept = [segment["picture"] for segment in entry["segments"]]
    assert kept == [None, "sample-000-subject-1.png", None, "sample-000-background-2.png", None]
    assert (tmp_path / "out" / kept[1]).read_bytes() == (tmp_path / "dog.png").read_bytes()
    assert {kept[1], kept[3]} < {file.path for file in certificate.files}
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


def test_words_are_given_the_rate_and_size_that_training_usually_had(
    trained: Stage1Config, tmp_path: Path
) -> None:
    (bare,) = plan_videos(values(trained, tmp_path / "out", prompts=["A dog runs."], fps=None), trained)
    assert (bare.fps, bare.original_size_px) == (8.0, (12, 16))
    own = values(trained, tmp_path / "out", prompts=["A dog runs."], fps=3.0, original_size_px=(7, 9))
    assert [(r.fps, r.original_size_px) for r in plan_videos(own, trained)] == [(3.0, (7, 9))]


def test_rows_of_shards_sample(trained: Stage1Config, tmp_path: Path) -> None:
    config = values(trained, tmp_path / "out", prompts=[], prompts_uri=trained.prompts, rows=1)
    assert run(config).num_out == 1
    entry = read_json(str(tmp_path / "out" / "samples.json"))["samples"][0]
    assert entry["task"] == "pretrain" and entry["prompt"].endswith("square moves to the right")


def test_a_document_by_hand_brings_its_text(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "blick.png")
    place = tmp_path / "prompts.jsonl"
    line = {"prompt": "<image> A blick runs.", "images": ["retrieved:a blick=blick.png"]}
    place.write_text(json.dumps(line))
    [prompt] = prompts_in_file(str(place), instruct=True)
    assert [(s.type, s.role, s.text) for s in prompt] == [
        ("text", "instruction", "Generate a video with the retrieved text-image."),
        ("text", "retrieved", "a blick"),
        ("image", "retrieved", None),
        ("text", "caption", "A blick runs."),
    ]
    assert describe_prompt(prompt).endswith("A blick runs.") and "a blick" not in describe_prompt(prompt)
    place.write_text(json.dumps(line | {"images": ["retrieved:=blick.png"]}))
    assert [s.role for s in prompts_in_file(str(place))[0]] == ["retrieved", "caption"]


def test_what_was_found_stands_where_each_stage_has_it(make_row) -> None:
    row = make_row(0)
    words = SampleRequest(parse_prompt("a red square", []), 8.0, (24, 40))
    one, two = (with_found(words, row, instruct=instruct) for instruct in (False, True))
    assert [s.role for s in one.prompt] == ["retrieved", "retrieved", "caption"]
    assert [s.role for s in two.prompt] == ["instruction", "retrieved", "retrieved", "caption"]
    assert two.prompt[0].text == "Generate a video with the retrieved text-image."
    assert one.prompt[-1].text == "a red square" and one.origins == two.origins
    assert one.origins[0]["doc_id"] == "doc-0" and one.origins[0]["memory_version"] == "test-1"


def of_shards(trained: Stage1Config, out: Path, **changes: Any) -> SampleConfig:
    return values(trained, out, **{"prompts": [], "prompts_uri": trained.prompts, "rows": 12} | changes)


def plan(trained: Stage1Config, out: Path, **changes: Any) -> list[SampleRequest]:
    return plan_videos(of_shards(trained, out, **changes), trained)


def texts_of(requests: list[SampleRequest]) -> list[list[str | None]]:
    return [[s.text for s in request.prompt if s.role == "retrieved" and s.text] for request in requests]


def test_right_none_and_shuffled_differ_in_documents_alone(trained: Stage1Config, tmp_path: Path) -> None:
    right, none, shuffled = (
        plan(trained, tmp_path, documents=choice, seeds=[3, 4]) for choice in ("right", "none", "shuffled")
    )
    assert [r.seed for r in right] == [3, 4] * 12
    for one, two, three in zip(right, none, shuffled, strict=True):
        assert one.seed == two.seed == three.seed
        assert one.prompt_id == two.prompt_id == three.prompt_id and one.clip_id is not None
        assert [s for s in one.prompt if s.role != "retrieved"] == list(two.prompt)
        assert [s for s in three.prompt if s.role != "retrieved"] == list(two.prompt)
        assert [s.role for s in one.prompt] == [s.role for s in three.prompt]
        assert retrieved(one.prompt) and not retrieved(two.prompt)
        assert one.documents_of is None and two.origins == () and three.documents_of != three.prompt_id
    # Four colours of three prompts each: nobody gets a document of his own colour, and all are handed out.
    for seed in (0, 1):
        pairs = list(zip(texts_of(right[seed::2]), texts_of(shuffled[seed::2]), strict=True))
        assert all(own != other for own, other in pairs)
        assert sorted(own for own, _ in pairs) == sorted(other for _, other in pairs)
    assert texts_of(shuffled[0::2]) != texts_of(shuffled[1::2])
    assert shuffled == plan(trained, tmp_path, documents="shuffled", seeds=[3, 4])
    moved = [replace(request, prompt_id=f"{request.prompt_id} elsewhere") for request in right[0::2]]
    assert texts_of(choose_documents(moved, "shuffled", 3)) == texts_of(shuffled[0::2])


def test_each_row_starts_from_its_own_noise_whatever_its_documents_and_folder(
    trained: Stage1Config, tmp_path: Path
) -> None:
    noises = [
        [request.noise_index for request in plan(trained, tmp_path, documents=choice, rows=4)]
        for choice in ("right", "none", "shuffled")
    ]
    assert noises[0] == noises[1] == noises[2]
    assert len(set(noises[0])) == len(noises[0])
    config = of_shards(trained, tmp_path)
    sampler, request = Sampler(config, find_checkpoint(config.source)), plan(trained, tmp_path)[0]
    again = sampler.videos([replace(request, prompt_id="of another folder", documents_of="another")])
    assert torch.equal(sampler.videos([request]), again)
    assert not torch.equal(sampler.videos([replace(request, clip_id="another")]), again)


def test_videos_made_together_are_those_made_alone(trained: Stage1Config, tmp_path: Path) -> None:
    """Prompts of other lengths and with other documents, whose company is only rounding."""
    words = SampleRequest(parse_prompt("a red square runs", []), 8.0, (24, 40), seed=1)
    requests = [plan(trained, tmp_path)[0], words, replace(words, seed=2)]
    for scheme in ("cfg", "retrieval"):
        config = of_shards(trained, tmp_path, guidance={"scheme": scheme, "weight": 2})
        sampler = Sampler(config, find_checkpoint(config.source))
        alone = torch.cat([sampler.videos([request]) for request in requests])
        assert torch.allclose(sampler.videos(requests), alone, atol=1e-4)
        assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_a_batch_at_a_time_makes_the_same_files(trained: Stage1Config, tmp_path: Path) -> None:
    certificates = [
        run(of_shards(trained, tmp_path / str(size), rows=5, num_steps=2, batch_size=size)) for size in (1, 2)
    ]
    one, two = (certificate.files for certificate in certificates)
    assert [file.path for file in one] == [file.path for file in two]
    entries = [read_json(str(tmp_path / n / "samples.json"))["samples"] for n in ("1", "2")]
    assert [e["prompt_id"] for e in entries[0]] == [e["prompt_id"] for e in entries[1]]


def test_documents_that_are_chosen_are_told_and_shown(trained: Stage1Config, tmp_path: Path) -> None:
    sheets = {}
    for choice in ("right", "none", "shuffled"):
        certificate = run(of_shards(trained, tmp_path / choice, rows=2, documents=choice))
        facts = read_json(str(tmp_path / choice / "samples.json"))
        assert facts["documents"] == choice
        for entry in facts["samples"]:
            assert entry["documents"] == choice and entry["clip_id"].startswith("clip-")
            sheets[choice] = Image.open(tmp_path / choice / entry["sheet"]).size[1]
            for document in entry["retrieved"]:
                assert document["text"].endswith("thing") and document["retriever"] == "bm25"
                assert document["rank"] == 1 and document["memory_version"] == "test-1"
                assert Image.open(tmp_path / choice / document["picture"]).size == (16, 12)
                assert document["picture"] in {file.path for file in certificate.files}
        texts = [[d["text"] for d in entry["retrieved"]] for entry in facts["samples"]]
        assert texts == {"none": [[], []]}.get(choice, texts) and (choice == "none" or all(texts))
    assert sheets["right"] == sheets["shuffled"] > sheets["none"]


def test_no_documents_are_the_prompt_cut_to_none(trained: Stage1Config, tmp_path: Path) -> None:
    run(of_shards(trained, tmp_path / "none", rows=1, documents="none"))
    run(of_shards(trained, tmp_path / "cut", rows=1, num_documents=0))
    one, two = (read_json(str(tmp_path / n / "samples.json"))["samples"][0] for n in ("none", "cut"))
    assert one["frames_sha256"] == two["frames_sha256"]


def test_rows_have_as_many_documents_as_the_run_learned_with(
    trained: Stage1Config, tmp_path: Path, make_shards, make_row
) -> None:
    row = make_row(0)
    row["segments"] = [*row["segments"][:2] * 4, row["segments"][2]]
    folder = str(make_shards(rows=[row]))
    for number, expected in ((None, max(trained.documents)), (3, 3), (0, 0)):
        planned = plan(trained, tmp_path, prompts_uri=folder, num_documents=number)
        assert [len(documents(request.prompt)) for request in planned] == [expected]
        assert len(planned[0].origins) == expected


def test_rows_of_one_split(trained: Stage1Config, tmp_path: Path, make_shards, make_row) -> None:
    rows = [make_row(n) | {"split": (None, "train", "test")[n % 3]} for n in range(12)]
    folder = str(make_shards(rows=rows))
    found = plan(trained, tmp_path, prompts_uri=folder, split="test")
    assert {request.prompt_id for request in found} == {
        row["prompt_id"] for row in rows if row["split"] == "test"
    }
    with pytest.raises(ConfigError, match=r"no prompt of split 'val' in .*; legal: None, test, train"):
        plan(trained, tmp_path, prompts_uri=folder, split="val")


def test_a_shuffle_that_cannot_part_the_documents_says_so(
    trained: Stage1Config, tmp_path: Path, make_shards, make_row, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make_shards(rows=[make_row(n) for n in (0, 4)]))  # both red
    run(of_shards(trained, tmp_path / "out", prompts_uri=folder, documents="shuffled"))
    assert "2 of 2 shuffled prompts hold a document of their own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": "shuffled"}, "0 of 1 prompts have documents; legal: at least two"),
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
