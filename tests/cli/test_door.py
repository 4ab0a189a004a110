"""The door: words, configs and paths are refused in one line, exit code 2, before anything starts."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
JOBS = {
    "crawl": ("pipeline.clips.crawl", "CrawlConfig"),
    "build": ("pipeline.memory.build_index", "BuildIndexConfig"),
    "augment": ("pipeline.prompts.augment", "AugmentConfig"),
    "instruct": ("pipeline.prompts.instruct", "InstructConfig"),
    "encode": ("cli.encode", "EncodeConfig"),
    "report": ("pipeline.report", "ReportConfig"),
    "stage1": ("model.training.stages", "Stage1Config"),
    "stage2": ("model.training.stages", "Stage2Config"),
    "sample": ("model.sampling.generate", "SampleConfig"),
}
CONFIGS = sorted((ROOT / "infra" / "configs").rglob("*.yaml"))


def command(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    program, *rest = words
    environment = {**os.environ, "COLUMNS": "120", "TERM": "dumb"}
    return subprocess.run(
        [str(BIN / program), *rest],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def refused(result: "subprocess.CompletedProcess[str]") -> str:
    assert result.returncode == 2, (result.returncode, result.stdout[-500:], result.stderr[-2000:])
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("program", ["vimi-data", "vimi-train"])
def test_help_imports_nothing_heavy(program: str, tmp_path: Path) -> None:
    module = {"vimi-data": "cli.data", "vimi-train": "cli.train"}[program]
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "ray", "transformers", "lancedb", "av", "open_clip", "matplotlib"} & set(
        loaded.stdout.split()
    )
    started_s = time.perf_counter()
    result = command(program, "--help", cwd=tmp_path)
    assert result.returncode == 0
    print(f"{program} --help: {time.perf_counter() - started_s:.2f} s")


def test_every_command_explains_itself(tmp_path: Path) -> None:
    import typer

    from cli import data, train

    for program, app in (("vimi-data", data.app), ("vimi-train", train.app)):
        names = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
        assert names
        for name in names:
            from typer.testing import CliRunner

            result = CliRunner().invoke(app, [name, "--help"])
            assert result.exit_code == 0, (program, name)
            assert "--config" in result.output or name in {
                "search",
                "validate",
                "redrive",
                "plan",
                "describe",
                "export",
            }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "infra" / "configs")))
def test_every_shipped_config_loads_and_opens_with_what_it_makes(path: Path) -> None:
    first = path.read_text().splitlines()[:6]
    assert first[0].startswith("# ")
    assert any("vimi-" in line for line in first), "the command belongs in the opening comment"
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    module, name = JOBS[path.stem.split("_", 1)[0]]
    getattr(importlib.import_module(module), name).load(path)


def test_unknown_key_is_refused_with_the_legal_ones(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("out: x\nsuorces: []\n")
    line = refused(command("vimi-data", "crawl", "--config", "c.yaml", cwd=tmp_path))
    assert "unknown key 'suorces'" in line
    assert "sources" in line


def test_missing_config_file_is_refused(tmp_path: Path) -> None:
    assert "can't read config" in refused(command("vimi-data", "crawl", "--config", "no.yaml", cwd=tmp_path))


def test_missing_corpus_is_refused(tmp_path: Path) -> None:
    line = refused(command("vimi-data", "crawl", "no_such_folder", "--out", "out", cwd=tmp_path))
    assert "no_such_folder" in line


def test_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    line = refused(command("vimi-data", "crawl", "corpus", "--out", "out", cwd=tmp_path))
    assert "no video or picture" in line


def test_unwritable_output_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.mp4").write_bytes(b"")
    (tmp_path / "file").write_text("")
    line = refused(command("vimi-data", "crawl", "corpus", "--out", "file/below", cwd=tmp_path))
    assert "can't write to" in line


def test_wrong_retriever_is_refused(tmp_path: Path) -> None:
    line = refused(
        command(
            "vimi-data", "augment", "clips", "--memory", "m", "--out", "o", "--retriever", "bm52", cwd=tmp_path
        )
    )
    assert "retriever" in line
    assert "bm25" in line


def test_uncertified_input_names_the_command_that_makes_it(tmp_path: Path) -> None:
    line = refused(command("vimi-data", "build-index", "nothing", "--out", "memory", cwd=tmp_path))
    assert "vimi-data crawl" in line
    line = refused(command("vimi-train", "stage1", "nothing", "--out", "run", cwd=tmp_path))
    assert "vimi-data augment" in line
