"""Laws of the commands: help at once, wrong words and configs refused a line each, exit code 2."""

import errno
import importlib
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from cli import data, train
from cli.common import quoted
from cli.errors import ours_in, tell
from infra.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
JOBS = {
    "world": ("pipeline.world.make", "WorldConfig"),
    "judge": ("pipeline.world.evidence", "EvidenceConfig"),
    "crawl": ("pipeline.clips.crawl", "CrawlConfig"),
    "build": ("pipeline.memory.build_index", "BuildIndexConfig"),
    "augment": ("pipeline.prompts.augment", "AugmentConfig"),
    "instruct": ("pipeline.prompts.instruct", "InstructConfig"),
    "encode": ("cli.encode", "EncodeConfig"),
    "report": ("pipeline.report", "ReportConfig"),
    "stage1": ("model.training.config", "Stage1Config"),
    "stage2": ("model.training.config", "Stage2Config"),
    "sample": ("cli.sample", "SampleConfig"),
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


def test_every_command_explains_itself() -> None:
    for program, app in (("vimi-data", data.app), ("vimi-train", train.app)):
        for declared in app.registered_commands:
            name = declared.name or getattr(declared.callback, "__name__", "")
            result = CliRunner().invoke(app, [name, "--help"], prog_name=program)
            assert result.exit_code == 0, (program, name)
            assert name == "describe" or f"Config of {program} {name}" in result.output


def test_help_loses_no_word_to_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """`<image>` was taken for a tag."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    for program, app in (("vimi-data", data.app), ("vimi-train", train.app)):
        for declared in app.registered_commands:
            callback = declared.callback
            assert callback is not None
            name = declared.name or callback.__name__
            shown = CliRunner().invoke(app, [name, "--help"], prog_name=program).output
            texts = [callback.__doc__ or ""]
            for parameter in inspect.signature(callback).parameters.values():
                texts += [option.help or "" for option in getattr(parameter.annotation, "__metadata__", ())]
            for text in texts:
                assert text in shown, (name, text)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/x")


def no_package() -> None:
    raise ModuleNotFoundError("No module named 'wandb'", name="wandb")


def no_permission() -> None:
    """As pyarrow says it: the place is in the text alone."""
    raise OSError(errno.EACCES, "Failed to open local file '/shut/x'. Detail: [errno 13] Permission denied")


def no_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        (full_disk, 1, "the disk is full"),
        (no_package, 2, "'wandb' is not installed; cure: pip install wandb"),
        (no_permission, 2, "no permission for /shut/x; cure: give this user the right"),
        (no_memory, 1, "out of memory; cure: fewer workers"),
    ],
)
@pytest.mark.ray
def test_what_a_user_can_mend_is_a_line_from_here_and_from_a_worker(
    fails: Callable[[], None], code: int, says: str, ray_cluster: None
) -> None:
    import ray

    for act in (fails, lambda: ray.get(ray.remote(fails).remote())):
        with pytest.raises(Exception) as caught:
            act()
        told = tell(caught.value)
        assert told is not None and told[1] == code and says in told[0] and "\n" not in told[0]


@pytest.mark.ray
def test_a_worker_that_is_lost_is_a_line_and_a_bug_keeps_its_traceback(ray_cluster: None) -> None:
    import ray

    for act, code in ((lambda: os._exit(3), 1), (lambda: 1 / 0, None)):
        with pytest.raises(Exception) as caught:
            ray.get(ray.remote(max_retries=0)(act).remote())
        told = tell(caught.value)
        assert (told and told[1]) == code
        assert told is None or ("WorkerCrashedError" in told[0] and "\n" not in told[0])


def test_the_next_command_is_quoted_for_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = SimpleNamespace(out=str(tmp_path / "my run"), clips=("/a b/c",))
    assert quoted("see {c.out} {c.clips[0]}", config) == "see 'my run' '/a b/c'"


@pytest.mark.ray
def test_an_error_of_ours_from_a_worker_is_told_without_its_traceback(ray_cluster: None) -> None:
    import ray

    def fails() -> None:
        raise DataError("the shard is torn")

    with pytest.raises(DataError) as caught:
        ray.get(ray.remote(fails).remote())
    assert str(ours_in(caught.value)) == "the shard is torn"


def test_the_error_that_is_told_is_the_outermost_of_ours() -> None:
    try:
        try:
            raise OSError("disk")
        except OSError as error:
            raise DataError("the shard is torn") from error
    except DataError as error:
        assert ours_in(error) is error
    assert ours_in(KeyError("bug")) is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "infra" / "configs")))
def test_every_shipped_config_loads_and_opens_with_what_it_makes(path: Path) -> None:
    first = path.read_text().splitlines()[:6]
    assert first[0].startswith("# ")
    assert any("vimi-" in line for line in first), "the command belongs in the opening comment"
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    module, name = JOBS[path.stem.split("_", 1)[0]]
    getattr(importlib.import_module(module), name).load(path)


def test_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("out: x\nsuorces: []\n")
    line = refused(command("vimi-data", "crawl", "--config", "c.yaml", cwd=tmp_path))
    assert "unknown key 'suorces' in c.yaml" in line
    assert line.endswith("cure: write 'sources'")


def test_three_faults_are_three_lines(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("sources: []\nout: x\nseed: 1\nfilters: {min_s: -1}\n")
    result = command("vimi-data", "crawl", "--config", "c.yaml", "--set", "max_failed_frac=all", cwd=tmp_path)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3 and all(line.startswith("vimi-data: ") for line in lines), lines
    assert all("legal: " in line and "cure: " in line for line in lines), lines


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
