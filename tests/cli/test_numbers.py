"""Every number of every config: nonsense is refused in one line before anything starts, without a hang."""

import math
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli import data, train
from cli.common import Job
from cli.errors import tell
from cli.reference import config_class, jobs
from infra.config import Config, set_dotted
from infra.errors import ConfigError
from infra.fields import ConfigField, type_text, walk
from model.training.preflight import read_index
from model.training.validation.loss import Validation
from pipeline.prompts.augment.target import TargetConfig
from tests.model.runs import advance, open_training

VALUES = (0, -1, 1e9, math.nan, math.inf)
MAPPINGS = {"noise": "sigma_data", "dropout": "all", "tasks": "subject_driven", "proportions": "subject_driven"}
BACKBONE = ("num_latents", "latent_dim", "num_blocks", "layers_per_block", "patch_px", "patch_dim", "dropout")
MAX_S, MAX_RUN_S, MAX_BYTES = 30, 240, 600_000_000


def cases(cls: type[Config]) -> Iterator[tuple[str, Callable[[float], Any]]]:
    """(dotted name, value -> what to set there) of each numeric field."""
    for field in walk(cls):
        words = type_text(field.info.annotation)
        if field.name == "backbone":
            for name in BACKBONE:
                yield f"backbone.{name}", lambda value: value
        elif words.startswith("mapping") and "to float" in words:
            yield f"{field.name}.{MAPPINGS[field.name.rpartition('.')[2]]}", lambda value: value
        elif "[int, int]" in words and "int or" not in words:
            yield field.name, lambda value: [value, value]
        elif words.startswith("list of int"):
            yield field.name, lambda value: [value]
        elif is_number(field):
            yield field.name, lambda value: value


def is_number(field: ConfigField) -> bool:
    return any(word in ("int", "float") for word in type_text(field.info.annotation).split())


def put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name; `sources[].depth` is one of the first item's."""
    group, is_list, last = name.partition("[].")
    if is_list:
        values[group] = [{**(values.get(group) or [{}])[0], last: value}]
    else:
        set_dotted(values, name, value)


@pytest.mark.parametrize(("title", "target"), list(jobs()), ids=[title for title, _ in jobs()])
def test_nonsense_is_refused_in_a_line_or_harmless(title: str, target: str, legal: dict[str, Any]) -> None:
    import importlib

    cls, check = config_class(target), getattr(importlib.import_module(target.partition(":")[0]), "check", None)
    wrong, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, too_long)
    try:
        for name, make in cases(cls):
            for value in VALUES:
                values = copied(legal[title])
                put(values, name, make(value))
                clear(values)
                fault = try_out(cls, check, values, must_refuse=not math.isfinite(value))
                if fault:
                    wrong.append(f"{name} = {value}: {fault}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert not wrong, "\n".join(wrong)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MAX_BYTES


def quick_jobs() -> Iterator[tuple[str, Job]]:
    """(command as typed, job) of all commands but the trainings."""
    for program, app in (("vimi-data", data.app), ("vimi-train", train.app)):
        for command in app.registered_commands:
            name = command.name or getattr(command.callback, "__name__", "")
            if name not in ("stage1", "stage2"):  # 1e9 samples are legal there, and take their time
                for job in getattr(command.callback, "jobs", ()):
                    yield f"{program} {name}", job


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("title", "job"), list(quick_jobs()), ids=[title for title, _ in quick_jobs()])
def test_what_is_accepted_runs_to_an_end_or_ends_in_a_line(
    title: str, job: Job, legal: dict[str, Any], tmp_path: Path, ray_cluster: None
) -> None:
    """The same walk, real: each number that the preflight lets pass, on a few rows."""
    numbers = list(cases(config_class(job.target)))
    if not numbers:
        pytest.skip("it has no numbers")
    old = signal.signal(signal.SIGALRM, too_long)
    try:
        told = carry_out(job, copied(legal[title]), tmp_path / "base")
        is_bare = title == "vimi-data judge"  # its samples are none, which ends in a line
        is_well = not told or (is_bare and told.startswith("line"))
        wrong = [] if is_well else [f"as it is: {told}"]
        for name, make in numbers:
            for value in VALUES:
                values = copied(legal[title])
                put(values, name, make(value))
                told = carry_out(job, values, tmp_path / f"{name}-{value:g}")
                if told and not told.startswith("line"):
                    wrong.append(f"{name} = {value}: {told}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_training_that_is_accepted_trains_or_ends_in_a_line(
    stage: str, legal: dict[str, Any], tmp_path: Path
) -> None:
    """Two steps, a checkpoint and a validation, without Ray: the end of 1e9 samples nobody sees."""
    (job,) = getattr(train, stage).jobs
    old = signal.signal(signal.SIGALRM, too_long)
    try:
        values = copied(legal[f"vimi-train {stage}"])
        assert carry_out(job, values, tmp_path / "base", begin_training) == ""
        wrong = []
        for name, make in cases(config_class(job.target)):
            for value in VALUES:
                values = copied(legal[f"vimi-train {stage}"])
                put(values, name, make(value))
                told = carry_out(job, values, tmp_path / f"{name}-{value:g}", begin_training)
                if told and not told.startswith("line"):
                    wrong.append(f"{name} = {value}: {told}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert not wrong, "\n".join(wrong)


def begin_training(config: Any) -> None:
    training = open_training(config)
    try:
        advance(training, 2)
        training.save({})
        Validation(training, read_index(config.out)).run()
    finally:
        training.close()


def carry_out(
    job: Job, values: dict[str, Any], folder: Path, work: Callable[[Any], object] | None = None
) -> str:
    """Run a job into a folder of its own; empty = done, `line: ...` = refused in a line, else what is wrong.

    Args:
        job: the command's.
        values: of its config.
        folder: where it may write.
        work: what to do with the config, if not what the command does.
    """
    values = moved(values, folder)
    signal.alarm(MAX_RUN_S)
    try:
        module, config = job.load(None, None, values)
        check = getattr(module, "check", None)
        if check is not None:
            check(config)
        (work or getattr(module, job.run))(config)
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        told = tell(error)
        if told is None or not all(0 < len(line) < 1000 for line in told[0].splitlines()):
            return f"{type(error).__name__}: {error}"
        return f"line: {told[0]}"
    finally:
        signal.alarm(0)
        shutil.rmtree(folder, ignore_errors=True)
    return ""


def moved(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values with an output in this folder; a memory that would grow is copied there."""
    folder.mkdir()
    out = values.get("out")
    if out is None:
        return values
    if Path(out).is_dir() and (Path(out) / "certificate.json").exists():
        shutil.copytree(out, folder / "out")
    return {**values, "out": str(folder / ("out.html" if str(out).endswith(".html") else "out"))}


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value


def clear(values: dict[str, Any]) -> None:
    """A preflight may claim its output; the next one is another run."""
    if "numbers" in values.get("out", ""):
        shutil.rmtree(values["out"], ignore_errors=True)


def too_long(*_: Any) -> None:
    raise TimeoutError("too long")


def try_out(cls: type[Config], check: Any, values: dict[str, Any], *, must_refuse: bool) -> str:
    """What is wrong with how the values are met; empty = nothing."""
    signal.alarm(MAX_S)
    try:
        config = cls.load(options=values)
        if check is not None:
            check(config)
    except ConfigError as error:
        return "" if all(0 < len(line) < 1000 for line in str(error).splitlines()) else f"told badly: {error}"
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        return f"{type(error).__name__}: {error}"
    return "accepted" if must_refuse else ""


def test_the_base_of_the_walk_is_legal(legal: dict[str, Any]) -> None:
    """Else the walk would only see a refusal of something else."""
    import importlib

    for title, target in jobs():
        clear(legal[title])
        config = config_class(target).load(options=copied(legal[title]))
        check = getattr(importlib.import_module(target.partition(":")[0]), "check", None)
        if check is not None:
            check(config)


def test_frames_that_no_row_can_hold_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="bytes in a row"):
        TargetConfig.load(options={"num_frames": 1024, "height_px": 4096, "width_px": 4096})
