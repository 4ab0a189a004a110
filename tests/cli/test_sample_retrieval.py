"""Laws of retrieval when sampling: a prompt in words gets what training had, and a record of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli import train
from cli.sample import SampleConfig, check, compare, retrieve, run
from infra.errors import ConfigError
from infra.storage import read_json
from model.condition import Prompt
from model.data.batch import read_prompt
from model.data.shards import open_shards
from model.prompt.select import select
from model.sampling.plan import plan_videos, texts_to_retrieve
from model.training.config import Stage1Config
from model.training.loop import Training
from model.training.preflight import prepare_index, read_index
from model.training.state import trained_by
from pipeline.memory import open_memory
from pipeline.prompts.augment import AugmentConfig
from pipeline.prompts.augment import check as check_augment
from pipeline.prompts.augment.job import make_units
from pipeline.prompts.augment.worker import AugmentWorker
from pipeline.prompts.user_prompt import PromptRetriever
from tests.model.conftest import tiny_stage
from tests.model.prompt_tables import write_shards

WORDS = "a red dog on the hill"


@dataclass(frozen=True)
class Trained:
    """A run, and what it was trained on."""

    stage: Stage1Config
    memory: str
    rows: list[dict[str, Any]]
    """As augment stored them."""


def augmented(clips: str, memory: str, out: Path) -> list[dict[str, Any]]:
    """Prompts of these clips, by augment's own worker in this process."""
    target = {"num_frames": 4, "height_px": 12, "width_px": 16}
    values = {"clips": clips, "memory": memory, "out": str(out), "target": target, "vectors": "stored"}
    config = AugmentConfig.model_validate(values)
    [unit] = make_units(config, check_augment(config))
    receipt = AugmentWorker(config, "x")(unit.payload)
    return pq.read_table(out / receipt["file"]["path"]).to_pylist()


def train_run(
    rows: list[dict[str, Any]], folder: Path, encoder: dict[str, Any], **changes: Any
) -> Stage1Config:
    """A run of one step on these prompts."""
    prompts = write_shards(folder / "prompts", rows, job="augment", group_rows=4, file_rows=16)
    config = Stage1Config.model_validate(tiny_stage(prompts, folder / "run", encoder) | changes)
    prepare_index(config, open_shards(config.prompts))
    training = Training(config, read_index(config.out))
    training.step()
    training.save({})
    training.close()
    return config


@pytest.fixture(scope="module")
def trained(world: Any, tiny_encoder: Any, tmp_path_factory: Any) -> Trained:
    """Trained on half of the world, with documents of the other half: none is of the clip's own source."""
    folder = tmp_path_factory.mktemp("retrieval")
    memory = world.write_memory(folder / "memory", world.rows[:12])
    clips = world.write_clips(folder / "clips", world.rows[12:])
    rows = augmented(clips, memory, folder / "augmented")
    return Trained(train_run(rows, folder, tiny_encoder), memory, rows)


def values(trained: Trained, out: Path, **changes: Any) -> SampleConfig:
    fields = {"run": trained.stage.out, "out": str(out), "num_steps": 2, "fps": 8, "prompts": [WORDS]}
    return SampleConfig.model_validate(fields | {"memory": trained.memory} | changes)


def plan(config: SampleConfig) -> list[Prompt]:
    base = trained_by(config.source)[1]
    found = retrieve(config, open_memory(str(config.memory)), texts_to_retrieve(config, base))
    return [request.prompt for request in plan_videos(config, base, found)]


def test_segments_are_those_that_augment_stores_for_the_same_caption(trained: Trained) -> None:
    captions = [row["caption"] for row in trained.rows]
    found = PromptRetriever(open_memory(trained.memory), AugmentConfig.model_fields["retrieve"].default)(
        captions
    )
    assert [row["segments"] for row in found] == [row["segments"] for row in trained.rows]
    assert max(row["num_documents"] for row in trained.rows) > 2
    names = ("num_documents", "memory_version", "model_hash")
    assert [[row[n] for n in names] for row in found] == [[row[n] for n in names] for row in trained.rows]


def test_a_prompt_is_what_training_reads_of_the_same_row(trained: Trained, tmp_path: Path) -> None:
    captions = [row["caption"] for row in trained.rows]
    planned = plan(values(trained, tmp_path, prompts=captions))
    most = max(trained.stage.documents)
    assert planned == [select(read_prompt(row), most) for row in trained.rows]
    one = plan(values(trained, tmp_path, prompts=captions, retrieve={"k": 1}))
    assert one == [select(read_prompt(row), 1) for row in trained.rows]


def test_what_was_found_lies_beside_the_video_and_no_retrieval_is_the_same_prompt_without(
    trained: Trained, tmp_path: Path
) -> None:
    words = ["sample", trained.stage.out, WORDS, "--memory", trained.memory, "-k", "1", "--steps", "2"]
    entries, heights = {}, {}
    for name, more in (("with", []), ("without", ["--no-retrieval"])):
        result = CliRunner().invoke(train.app, [*words, *more, "--out", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        [entries[name]] = read_json(str(tmp_path / name / "samples.json"))["samples"]
        heights[name] = Image.open(tmp_path / name / "sample-000.png").size[1]
    assert heights["with"] > heights["without"]
    assert entries["without"]["retrieved"] == [] and entries["without"]["documents"] == "none"
    [document] = entries["with"]["retrieved"]
    memory = open_memory(trained.memory)
    [row] = memory.rows([document["doc_id"]], ["text", "image"]).to_pylist()
    assert document["text"] == row["text"] and (document["rank"], document["retriever"]) == (1, "bm25")
    assert document["memory_version"] == memory.version and document["score"] > 0
    assert (tmp_path / "with" / document["picture"]).read_bytes() == row["image"]
    assert entries["with"]["prompt"] == entries["without"]["prompt"] == WORDS
    with_, without = (plan(values(trained, tmp_path, documents=d))[0] for d in ("right", "none"))
    assert without == tuple(s for s in with_ if s.role != "retrieved") != with_


def test_prompts_of_a_user_are_shuffled_too(trained: Trained, tmp_path: Path) -> None:
    prompts = ["a red dog", "the guitar slowly"]
    own = plan(values(trained, tmp_path, prompts=prompts, retrieve={"k": 1}))
    other = plan(values(trained, tmp_path, prompts=prompts, retrieve={"k": 1}, documents="shuffled"))
    assert [p[:2] for p in other] == [p[:2] for p in own][::-1] != [p[:2] for p in own]
    assert [p[2:] for p in other] == [p[2:] for p in own]


def test_documents_given_by_hand_stay(trained: Trained, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "blick.png")
    place = f"retrieved:a blick={tmp_path / 'blick.png'}"
    [prompt] = plan(values(trained, tmp_path, prompts=["<image> a blick moves left"], images=[place]))
    assert [(s.type, s.role, s.text) for s in prompt] == [
        ("text", "retrieved", "a blick"),
        ("image", "retrieved", None),
        ("text", "caption", "a blick moves left"),
    ]


def test_another_memory_is_told_in_a_line(
    trained: Trained,
    world: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, memory = trained_by(values(trained, tmp_path).source)[1], open_memory(trained.memory)
    assert compare(values(trained, tmp_path), base, memory) == []
    other = world.write_memory(tmp_path / "memory", world.rows[:9])
    config = values(trained, tmp_path / "out", memory=other, retrieve={"k": 3, "retriever": "bm25"})
    there, here = memory.version, open_memory(other).version
    assert compare(config, base, open_memory(other)) == [
        f"the run has learned with documents of memory {there}, not {here}",
        "3 documents are asked for, the run has learned with at most 2: the best 2 are used",
    ]
    assert run(config).num_out == 1
    assert f"note: the run has learned with documents of memory {there}" in capsys.readouterr().err
    moved = base.model_copy(update={"prompts": str(tmp_path / "nowhere")})
    assert compare(config, moved, memory)[0].endswith("it can't be compared with this memory")


def test_words_that_find_nothing_are_told(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [len(prompt) for prompt in plan(values(trained, tmp_path, prompts=["zzz"]))] == [1]
    assert "1 of 1 prompts found no document, such as 'zzz'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": None, "retrieve": {"k": 2}}, "retrieve without a memory; cure: give --memory"),
        ({"memory": "/nowhere"}, "/nowhere"),
        ({"memory_version": "memory-0"}, "memory version 'memory-0' is not in"),
        ({"prompts": [], "prompts_uri": "rows"}, "no prompt in words that lacks documents"),
        ({"retrieve": {"retriever": "psychic"}}, "no such retriever"),
    ],
)
def test_preflight_refuses_in_one_line(
    trained: Trained, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if changes.get("prompts_uri"):
        changes = changes | {"prompts_uri": trained.stage.prompts}
    with pytest.raises((ConfigError, ValueError), match=message):
        check(values(trained, tmp_path / "out", **changes))


def test_a_run_without_documents_and_another_clip_are_refused(
    trained: Trained,
    tiny_encoder: Any,
    tmp_path: Path,
) -> None:
    never = train_run(trained.rows, tmp_path / "never", tiny_encoder, documents=[0])
    with pytest.raises(ConfigError, match=r"has learned without documents \(documents: 0"):
        check(values(trained, tmp_path / "out", run=never.out))
    bare = [row | {"num_documents": 0, "segments": row["segments"][-1:]} for row in trained.rows]
    none = train_run(bare, tmp_path / "none", tiny_encoder)
    with pytest.raises(ConfigError, match=r"has learned without documents.*no prompt of .* has any"):
        check(values(trained, tmp_path / "out", run=none.out))
    with pytest.raises(ConfigError, match=r"was embedded with offline \(a model\), not with offline"):
        run(values(trained, tmp_path / "out", retrieve={"retriever": "clip"}))
    assert not (tmp_path / "out").exists()
