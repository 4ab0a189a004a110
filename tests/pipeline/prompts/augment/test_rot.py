"""Flipped bits and cut files in all that the data side leaves: refused in one line, or without effect."""

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.certificate import TRUST, write_sealed
from infra.cluster import RayConfig
from infra.errors import DataError, VimiError
from model.data.buckets import Bucket
from model.data.shards import index_shards, open_shards
from pipeline.memory import open_memory
from pipeline.memory.search import SearchConfig
from pipeline.memory.search import run as search
from pipeline.memory.store import check_shard
from pipeline.prompts import augment, instruct
from pipeline.prompts.augment.job import make_units
from pipeline.prompts.augment.worker import AugmentWorker
from pipeline.prompts.subjects import job as subjects
from pipeline.prompts.tasks import RECIPES
from pipeline.report import ReportConfig
from pipeline.report import run as report
from pipeline.report.validate import ValidateConfig, validate
from pipeline.shards import ShardSet
from tests.pipeline.prompts.test_crops import ball as ball
from tests.pipeline.prompts.test_crops import film as film

pytestmark = pytest.mark.ray
FOLDERS = ("clips", "memory", "prompts", "instructions", "film", "crops", "pairs")
PARTS = FOLDERS[:4]
"""Of the page's long form."""
Commands = dict[str, tuple[tuple[str, ...], Callable[[], Any]]]


@pytest.fixture(scope="module")
def folder(
    world: Any,
    film: tuple[str, str],
    ray_cluster: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small workspace as the commands leave it."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(world.clips, folder / "clips")
    world.write_memory(folder / "memory", world.rows)
    augment.run(augment_config(folder, "prompts"))
    instruct.run(instruct_config(folder, "instructions"))
    for place, name in zip(film, ("film", "crops"), strict=True):
        shutil.copytree(place, folder / name)
    instruct.run(pairs_config(folder, "pairs"))
    return folder


def augment_config(folder: Path, out: str) -> augment.AugmentConfig:
    values = {"clips": str(folder / "clips"), "memory": str(folder / "memory"), "out": str(folder / out)}
    return augment.AugmentConfig.model_validate({**values, "shard_rows": 10, "ray": RayConfig(num_cpus=2)})


def instruct_config(folder: Path, out: str) -> instruct.InstructConfig:
    tasks = ("video_prediction", "text_to_video")
    return instruct.InstructConfig(prompts=str(folder / "prompts"), out=str(folder / out), tasks=tasks)


def pairs_config(folder: Path, out: str) -> instruct.InstructConfig:
    """Stage 2's pictures out of the table of crops."""
    values = {name: str(folder / place) for name, place in {"prompts": "film", "crops": "crops"}.items()}
    return instruct.InstructConfig.model_validate(
        {**values, "out": str(folder / out), "pairs": "cross_clip", "tasks": ("subject_driven",)}
    )


def commands(folder: Path) -> Commands:
    """Name -> (folders that it reads, what it does in this process with what it reads)."""
    scratch = str(folder / "scratch")

    def searched() -> Any:
        values = {
            "memory": str(folder / "memory"),
            "text": "a dog runs",
            "retrieve": {"retriever": "bm25", "k": 3},
        }
        return search(SearchConfig.model_validate(values))

    def augmented() -> Any:
        config = augment_config(folder, "scratch")
        inputs = augment.check(config)
        worker = AugmentWorker(config, "x")
        for shard in inputs.memory.shards:  # as the job does first
            check_shard(config.memory, shard.name)
        try:
            receipts = [worker(unit.payload) for unit in list(make_units(config, inputs))[:2]]
        finally:
            worker.decoder.close()
        return json.dumps(receipts, default=str)

    def instructed(configure: Callable[[Path, str], instruct.InstructConfig]) -> Any:
        config = configure(folder, "scratch")
        shards = instruct.check(config)
        recipes = {task: RECIPES[task] for task in config.tasks}
        worker = instruct.InstructWorker(config, "x", recipes)
        units = instruct.plan_units(shards, config.clips, config.unit_rows)
        return json.dumps([worker(unit.payload) for unit in units], default=str)

    def cropped() -> Any:
        values = {"prompts": str(folder / "film"), "out": scratch, "subjects": {"clip": None}}
        config = subjects.CropsConfig.model_validate(values)
        worker = subjects.CropsWorker(config)
        return [worker(u.payload) for u in instruct.plan_units(subjects.check(config), None, config.unit_rows)]

    return {
        "search": (("memory",), searched),
        "augment": (("clips", "memory"), augmented),
        "instruct": (("prompts",), partial(instructed, instruct_config)),
        "subjects": (("film",), cropped),
        "instruct --pairs": (("film", "crops"), partial(instructed, pairs_config)),
        **readers(folder, f"{scratch}/page.html"),
    }


def readers(folder: Path, page: str) -> Commands:
    """As `commands`, of those that make no table."""

    def validated(name: str) -> Any:
        found = validate(ValidateConfig(prompts=str(folder / name), memory=str(folder / "memory")))
        if not found.is_valid:
            raise DataError("NOT valid")
        return found.lines()

    def reported(**places: str) -> Any:
        values = {name: str(folder / place) for name, place in places.items()}
        return Path(report(ReportConfig.model_validate({**values, "out": page}))).read_bytes()

    def indexed() -> Any:
        buckets = (Bucket("video", num_frames=16, height_px=36, width_px=64),)
        return index_shards(open_shards(str(folder / "prompts")), buckets).to_pylist()

    return {
        "validate": (("prompts", "memory"), partial(validated, "prompts")),
        "validate instructions": (("instructions", "memory"), partial(validated, "instructions")),
        "stage 1's index": (("prompts",), indexed),
        "report": (PARTS, partial(reported, **{name: name for name in PARTS})),
        "report --crops": (("crops", "pairs"), partial(reported, crops="crops", instructions="pairs")),
    }


def kinds(folder: Path, folders: tuple[str, ...] = FOLDERS) -> dict[str, list[Path]]:
    """Kind of artefact -> its files."""
    found: dict[str, list[Path]] = {}
    for name in folders:
        for path in sorted((folder / name).rglob("*")):
            if path.is_file() and "_transactions" not in path.parts:
                place = path.parent.name if name == "memory" else path.stem.partition("-")[0]
                found.setdefault(f"{name}/{place}{path.suffix}", []).append(path)
    return found


def spoil(path: Path, random: np.random.Generator) -> None:
    """Flip a bit, cut the file, or take it away."""
    data, how = bytearray(path.read_bytes()), random.integers(0, 8)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(data[: random.integers(0, max(len(data), 1))])
    else:
        data[random.integers(0, len(data))] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(data)


def assert_refused_or_harmless(
    folder: Path, path: Path, seed: int, all_commands: Commands, before: dict[str, Any], only: str | None = None
) -> int:
    """How many commands refused."""
    whole, refused, name = path.read_bytes(), 0, path.relative_to(folder).parts[0]
    spoil(path, np.random.default_rng(seed))
    try:
        for command, (reads, run) in all_commands.items():
            if name not in reads or (only is not None and command != only):
                continue
            where = f"{command} with {path.relative_to(folder)} spoilt by seed {seed}"
            try:
                after = run()
            except VimiError as error:
                assert len(str(error).splitlines()) == 1, where
                refused += 1
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            else:
                assert after == before[command], where
    finally:
        path.write_bytes(whole)
    return refused


@pytest.fixture(scope="module")
def before(folder: Path) -> dict[str, Any]:
    return {name: run() for name, (_, run) in commands(folder).items()}


def test_every_kind_of_damage_is_refused_or_harmless(folder: Path, before: dict[str, Any]) -> None:
    """The short form: each kind of artefact once; the page, which reads everything, in the long one."""
    quick = {name: command for name, command in commands(folder).items() if name != "report"}
    refused = 0
    for number, files in enumerate(kinds(folder).values()):
        refused += assert_refused_or_harmless(folder, files[number % len(files)], number, quick, before)
    assert refused > len(kinds(folder))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_of_damage_are_refused_or_harmless(folder: Path, before: dict[str, Any]) -> None:
    started_s, seed = time.monotonic(), 1000
    while time.monotonic() - started_s < float(os.environ.get("VIMI_FUZZ_S", "600")):
        for files in kinds(folder).values():
            seed += 1
            assert_refused_or_harmless(folder, files[seed % len(files)], seed, commands(folder), before)


def test_one_flipped_bit_of_lance_names_the_file_and_trust_skips_the_look(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.write_memory(tmp_path, world.rows)
    file = next(tmp_path.rglob("*.lance/data/*.lance"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"{file.name} is not the file that was certified.*cure: restore it"):
        open_memory(str(tmp_path))
    monkeypatch.setenv(TRUST, "1")
    assert open_memory(str(tmp_path)).num_documents == len(world.rows)


def test_a_shard_is_looked_at_again_when_it_changes_after_it_was_read(folder: Path) -> None:
    shards = ShardSet(str(folder / "prompts"))
    first = shards.read_row_group(0)
    file = folder / "prompts" / "part-00000.parquet"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DataError, match="part-00000"):
            ShardSet(str(folder / "prompts")).read_row_group(0)
    finally:
        file.write_bytes(whole)
    assert ShardSet(str(folder / "prompts")).read_row_group(0) == first


def test_an_edited_certificate_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "prompts", tmp_path / "prompts")
    place = tmp_path / "prompts" / "certificate.json"
    place.write_text(place.read_text().replace('"num_in"', '"num_ín"'))
    with pytest.raises(VimiError, match="damaged, edited"):
        ShardSet(str(tmp_path / "prompts"))
    write_sealed(str(place), {"job": "augment"})
    with pytest.raises(VimiError, match="is not a certificate"):
        ShardSet(str(tmp_path / "prompts"))
