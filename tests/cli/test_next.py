"""Printed commands work: every `next:` line, run as printed, in a folder whose names need quotes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cli import data, train
from cli.common import next_commands
from cli.errors import tell
from infra.certificate import Certificate
from pipeline.report.provenance import next_steps
from pipeline.report.read import Parts, ReportConfig
from tests.model.prompt import tiny_mllms
from tests.model.prompt_tables import prompt_row, write_shards

APPS = {"vimi-data": data.app, "vimi-train": train.app}


class Shell:
    """Runs commands in this process, as a shell would split them; keeps the `next:` lines that they print."""

    def __init__(self) -> None:
        self.printed: dict[str, list[str]] = {}

    def __call__(self, line: str, *, dry: bool = False) -> str:
        program, *words = shlex.split(line)
        result = CliRunner().invoke(APPS[program], [*words, *(["--dry-run"] if dry else [])], prog_name=program)
        error = result.exception
        said = (tell(error) if error is not None else None) or error
        assert result.exit_code == 0, f"{line}\n{result.output[-2000:]}\n{said}"
        if not dry:
            found = re.findall(r"^  next: (.*)$", result.output, re.MULTILINE)
            self.printed[f"{program} {words[0]}"] = found
        return result.output

    def next_of(self, command: str) -> list[str]:
        return self.printed[command]


@pytest.mark.ray
def test_every_next_command_of_the_data_side_runs_as_printed(
    ray_cluster: None,
    write_video: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = tmp_path / "my $place"
    for number, noun in enumerate(("dog", "cat", "boat")):
        path = write_video(here / "my videos" / f"{noun} #1.mp4", num_frames=12, fps=6, seed=number)
        path.with_suffix(".txt").write_text(f"a {noun} moves to the right")
    monkeypatch.chdir(here)
    shell = Shell()
    shell("vimi-data crawl 'my videos' --out 'my clips'")
    (build,) = shell.next_of("vimi-data crawl")
    shell(build)
    (here / "llava").mkdir()
    for part in tiny_mllms.made("llava"):
        part.save_pretrained(here / "llava")
    shell("vimi-data caption 'my clips' --out 'with words' --model llava --set clip.name=offline")
    (build,) = shell.next_of("vimi-data caption")
    shell(build, dry=True)
    shell("vimi-data redrive 'my clips' --out 'again $1'")
    (build,) = shell.next_of("vimi-data redrive")
    assert "'again $1'" in build
    shell(build, dry=True)
    search, augment = shell.next_of("vimi-data build-index")
    assert "dog" in shell(search)
    shell(augment + " --set target.num_frames=4 --set target.height_px=12 --set target.width_px=16")
    (stage1,) = shell.next_of("vimi-data augment")
    assert "--config" in stage1 and "num_frames=4" in stage1
    assert "num_frames: 4\n" in shell(stage1, dry=True)
    shell("vimi-data subjects prompts --out 'the crops'")
    (instruct,) = shell.next_of("vimi-data subjects")
    assert "the crops" in " ".join(shell(instruct, dry=True).split())
    shell("vimi-data encode prompts --out 'the encodings' --for " + stage1.partition("--config ")[2])
    (encoded,) = shell.next_of("vimi-data encode")
    assert "the encodings" in " ".join(shell(encoded, dry=True).split())


def test_the_next_commands_of_instruct_fit_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pretraining in its place they begin with one."""
    monkeypatch.chdir(tmp_path)
    rows = [prompt_row(n, media="image", height=12, width=16, task="text_to_video") for n in range(4)]
    for name, job in (("made of $x", "instruct"), ("the prompts", "augment")):
        write_shards(tmp_path / name, rows, job=job, group_rows=4, file_rows=16)
    from cli.data import INSTRUCT

    places = {"out": str(tmp_path / "made of $x"), "prompts": str(tmp_path / "the prompts")}
    config = type("Config", (), places)
    first, line = next_commands(INSTRUCT, config)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "runs/stage1" in Shell()(first, dry=True)
    (tmp_path / "runs" / "stage1").mkdir(parents=True)
    assert next_commands(INSTRUCT, config) == [line]
    words = shlex.split(line)
    assert words[2] == "made of $x" and "height_px=12" in words
    assert 'buckets=[{"media": "image", "num_frames": 16}]' in words


def test_the_next_command_of_a_training_runs_as_printed(
    trained_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (train.stage1, train.stage2):
        (line,) = next_commands(command.jobs[0], trained_run)
        Shell()(line)
    assert (tmp_path / "samples").exists() and (tmp_path / "samples-2").exists()


@pytest.mark.ray
def test_the_next_command_of_evaluate_runs_as_printed(
    ray_cluster: None,
    write_video: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "my $films" / "a #1.mp4", num_frames=16)
    shell = Shell()
    shell("vimi-train evaluate --videos 'my $films' --out 'the scores' --metrics flicker")
    (page,) = shell.next_of("vimi-train evaluate")
    assert "scores.html" in shell(page)


@pytest.mark.ray
def test_every_next_command_of_a_world_runs_as_printed(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    shell = Shell()
    shell("vimi-data world --out 'my world' --nouns 2 --unseen 1 --distractors 1 --size 16 --frames 4")
    for line in shell.next_of("vimi-data world"):
        shell(line)
    (stage1,) = shell.next_of("vimi-data augment")
    shell(stage1, dry=True)


def test_every_command_that_proposes_others_is_tested_here() -> None:
    proposing = {
        command.name or getattr(command.callback, "__name__", "")
        for app in APPS.values()
        for command in app.registered_commands
        if any(job.then for job in getattr(command.callback, "jobs", ()))
    }
    data_side = {"world", "crawl", "redrive", "caption", "build-index", "augment", "subjects", "instruct"}
    assert proposing == data_side | {"stage1", "stage2", "evaluate"}


def test_without_a_config_a_small_corpus_is_not_trained_for_the_papers_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what that would be, and the command that it proposes runs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [prompt_row(n) for n in range(4)]
    write_shards(tmp_path / "prompts", rows, job="augment", group_rows=4, file_rows=16)
    words = ["stage1", str(tmp_path / "prompts"), "--out", str(tmp_path / "run")]
    error = CliRunner().invoke(train.app, words).exception
    told = tell(error) if error is not None else None
    assert told is not None and told[1] == 2
    assert "550,000 steps of 4096 samples" in told[0] and "parameters" in told[0]
    found = re.search(r"add (--config .*); or --set", told[0])
    assert found is not None and not (tmp_path / "run").exists()
    Shell()(f"vimi-train {shlex.join(words)} {found[1]}", dry=True)


@pytest.mark.parametrize("made", range(6))
def test_the_report_proposes_commands_that_there_are(made: int) -> None:
    """Each is parsed by the program's own command line, which refuses words that it doesn't know."""
    folders = {"clips": "my clips", "memory": "m", "prompts": "p", "instructions": "i", "runs": ("r",)}
    config = ReportConfig.model_validate({"out": "o", **dict(list(folders.items())[:made])})
    crawl = Certificate(job="crawl", config_hash="", num_in=2, num_out=1, dead={"timeout": 1})
    certificates = {"crawl": ("my clips", crawl)} if config.clips else {}
    steps = next_steps(config, Parts(None, None, None, None, [], (), certificates))
    assert steps
    for step in steps:
        program, name, *words = shlex.split(step["command"])
        get_command(APPS[program]).commands[name].make_context(name, words)  # type: ignore[attr-defined]
