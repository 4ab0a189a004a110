"""Flipped bits in what the other commands read, from crawl to page: refused or harmless."""

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cli import encode, sample
from cli import evaluate as evaluation
from infra.certificate import TRUST, Certificate, require_certificate
from infra.claim import open_job
from infra.clip import ClipConfig
from infra.cluster import RayConfig
from infra.errors import DataError
from model.data.inputs import InputConfig
from model.data.shards import open_parquet, open_shards
from model.encodings.make import make_row_encoder
from model.encodings.store import open_encodings
from model.evaluate.results import make_results
from model.sampling import generate
from model.sampling.plan import NOTHING, SampleConfig, plan_videos
from model.sampling.requests import prompt_hash
from model.training.checkpoint import find_checkpoint, read_facts
from model.training.config import config_of
from pipeline.clips import caption, redrive
from pipeline.clips.crawl import CrawlConfig
from pipeline.evaluate.worker import EvaluateWorker
from pipeline.memory.embed.worker import Embedder, clip_units
from pipeline.prompts import benchmark
from pipeline.prompts.augment.target import TargetConfig, make_target
from pipeline.prompts.benchmark.job import read_exam
from pipeline.prompts.encode import Worker as EncodeWorker
from pipeline.prompts.encode import plan_units
from pipeline.prompts.exclusion import read_exclusion
from pipeline.report import ReportConfig
from pipeline.report import run as report
from pipeline.schema import RowError
from pipeline.shards import open_part, shards_of
from pipeline.world import evidence
from tests.model.prompt import tiny_mllms
from tests.pipeline.conftest import WriteVideo
from tests.pipeline.prompts.augment.conftest import clip_rows, write_clips, write_memory
from tests.pipeline.prompts.augment.test_rot import Commands, assert_refused_or_harmless, kinds
from tests.pipeline.world.test_evidence import make_judged

pytestmark = pytest.mark.ray
FOLDERS = (
    *("videos", "clips", "captioned", "memory", "prompts", "encodings", "bench", "samples", "scores"),
    *("world", "asked", "right", "judged"),
)


@pytest.fixture(scope="module")
def folder(
    trained_run: Any,
    tiny_encoder: dict[str, Any],
    write_video: WriteVideo,
    ray_cluster: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small workspace as the commands leave it; the run itself is flipped by tests of the trainer."""
    folder = tmp_path_factory.mktemp("workspace")
    rows = clip_rows(folder / "videos", write_video, videos=3, cuts=2)
    write_memory(folder / "memory", rows)
    lost = {"clip_id": "lost", "status": "timeout", "error": "too late", "attempt": 1}
    write_clips(folder / "clips", [*rows, rows[-1] | {"source_uri": "http://site.org/a.mp4", **lost}])
    crawl = CrawlConfig.load(
        options={"sources": [{"kind": "folder", "path": "x"}], "out": str(folder / "clips")}
    )
    open_job(crawl.out, job="crawl", config=crawl, inputs={})
    shutil.copytree(trained_run.prompts, folder / "prompts")
    shutil.copytree(trained_run.out, folder / "run")
    encode.run(encode_config(folder, tiny_encoder))
    benchmark.run(benchmark_config(folder, "prompts"))
    generate.run(sample_config(folder))
    evaluation.run(evaluate_config(folder, tiny_encoder, "samples"))
    for part in tiny_mllms.made("llava"):
        part.save_pretrained(folder / "llava")
    caption.run(caption_config(folder, "captioned"))
    make_judged(folder, 2, prompts="asked")
    evidence.run(evidence_config(folder, "judged"))
    return folder


def encode_config(folder: Path, encoder: dict[str, Any]) -> encode.EncodeConfig:
    places = {"prompts": str(folder / "prompts"), "out": str(folder / "encodings")}
    size = {"num_frames": 4, "height_px": 12, "width_px": 16}
    return encode.EncodeConfig.model_validate(
        {**places, **size, "encoder": encoder, "ray": RayConfig(num_cpus=2)}
    )


def benchmark_config(folder: Path, source: str) -> benchmark.BenchmarkConfig:
    values = {"protocol": "own", "source": str(folder / source), "out": str(folder / "bench")}
    return benchmark.BenchmarkConfig.model_validate({**values, "held_out_frac": 0.7})


def sample_config(folder: Path) -> SampleConfig:
    values = {
        "run": str(folder / "run"),
        "out": str(folder / "samples"),
        "prompts_uri": str(folder / "prompts"),
    }
    return SampleConfig.model_validate({**values, "rows": 3, "num_steps": 1})


def evaluate_config(folder: Path, encoder: dict[str, Any], videos: str) -> evaluation.EvaluateConfig:
    values = {
        "videos": str(folder / videos),
        "against": str(folder / "prompts"),
        "out": str(folder / "scores"),
        "metrics": ["clip_t", "flicker", "clip_fid"],
        "allow_small_n": True,
        "frames": {"num_frames": 4},
        "networks": {"clip": encoder["clip"]},
        "cache": str(folder / "cache"),
    }
    return evaluation.EvaluateConfig.model_validate(values)


def caption_config(folder: Path, out: str) -> caption.CaptionConfig:
    values = {"clips": str(folder / "clips"), "model": str(folder / "llava"), "out": str(folder / out)}
    return caption.CaptionConfig.model_validate(
        {**values, "which": "all", "clip": None, "max_tokens": 4, "ray": RayConfig(num_cpus=2)}
    )


def evidence_config(folder: Path, out: str) -> evidence.EvidenceConfig:
    sets = {"right": {"samples": str(folder / "right"), "prompts": str(folder / "asked")}}
    claim = {"words": "it is so", "measure": "colour", "of": "right", "at_least": 0.5}
    values = {"world": str(folder / "world"), "out": str(folder / out), "sets": sets, "claims": [claim]}
    return evidence.EvidenceConfig.model_validate(values)


def refuse(found: list[tuple[str, str | None]]) -> None:
    """A bad row keeps its fate and the job goes on; here each has been good."""
    for status, error in found:
        if status != "ok":
            raise DataError(f"{status}: {error}")


@dataclass(frozen=True)
class Readers:
    """What each command does in this process with what it reads, a method each."""

    folder: Path
    encoder: dict[str, Any]

    def evaluated(self, videos: str) -> Any:
        config = evaluate_config(self.folder, self.encoder, videos)
        plan = evaluation.make_plan(config)
        worker = EvaluateWorker(
            partial(evaluation.make_extractor, config, plan.features, "cpu"), config.frames, 60
        )
        try:
            receipts = [worker(unit.payload) for unit in plan.units]
        finally:
            worker.child.close()
        refuse([(receipt["status"], receipt.get("error")) for receipt in receipts])
        rows = [
            {"side": side, "name": payload["name"], "text": (payload["prompt"] or {}).get("text"), **receipt}
            for (side, payload), receipt in zip(plan.payloads, receipts, strict=True)
        ]
        cache, frames = evaluation.open_cache(config), config.frames.model_dump(mode="json")
        how = {"cache": cache, "networks": config.networks, "frames": frames, "system": plan.system}
        return make_results(rows, plan.metrics, plan.obstacles, **how, allow_small_n=True)[0]

    def embedded(self, name: str) -> Any:
        clip = ClipConfig.model_validate(self.encoder["clip"])
        maker = Embedder(clip, str(self.folder / "staged"), 2, device="cpu", threads=1)()
        units = clip_units([self.clips(name)], rows_per_unit=4, key="x")
        receipts = [maker(unit.payload) for unit in units]
        refuse([(status, error) for r in receipts for _, _, status, error in r["rejected"]])
        return json.dumps(receipts, default=str)

    def clips(self, name: str = "clips") -> tuple[str, Certificate]:
        place = str(self.folder / name)
        return place, require_certificate(place, job="crawl", made_by="vimi-data crawl")

    def captioned(self) -> Any:
        config = caption_config(self.folder, "new")
        filters, source = caption.check(config), self.clips()[1]
        worker = caption.Worker(config, filters, "a model")
        try:
            receipts = [worker(unit.payload) for unit in caption.plan_units(config, source)]
        finally:
            worker.close()
        rows = [row for receipt in receipts for row in receipt["changed"].values()]
        refuse([(row["status"], row["error"]) for row in rows])
        return rows

    def judged(self) -> Any:
        return evidence.run(evidence_config(self.folder, "scratch"))

    def opened(self) -> Any:
        config = ReportConfig(
            evidence=str(self.folder / "judged"), out=str(self.folder / "scratch" / "page.html")
        )
        return Path(report(config)).read_bytes()

    def targets(self) -> Any:
        uri, certificate = self.clips()
        made = []
        for part in shards_of(uri, certificate):
            for row in open_part(part).read().to_pylist():
                if row["status"] == "ok":
                    try:
                        made.append(
                            make_target(row, TargetConfig(num_frames=4, height_px=12, width_px=16)).phashes
                        )
                    except RowError as error:
                        raise DataError(str(error)) from error
        return made

    def redriven(self) -> Any:
        config = redrive.RedriveConfig(clips=str(self.folder / "clips"), out=str(self.folder / "new"))
        uri, certificate = config.clips, redrive.check(config)[0]
        files = [f"{uri}/{file.path}" for file in certificate.files]
        return [unit.payload for unit in redrive.make_units(files)], list(redrive.read_parents(files))

    def encoded(self) -> Any:
        config = encode_config(self.folder, self.encoder).model_copy(
            update={"out": str(self.folder / "scratch")}
        )
        values = config.model_dump(mode="json", include=set(InputConfig.model_fields))
        worker = EncodeWorker(partial(make_row_encoder, values, "cpu"), config.prompts, config.out)
        return json.dumps([worker(unit.payload) for unit in plan_units(worker.shards)], default=str)

    def stored(self) -> Any:
        encodings = open_encodings(str(self.folder / "encodings"))
        assert encodings is not None
        groups = open_shards(str(self.folder / "prompts")).groups
        files = [(open_parquet(encodings.place(group)), group.num_rows) for group in groups]
        return [encodings.read_row(file, n).row for file, count in files for n in range(count)]

    def examined(self, source: str) -> Any:
        return read_exam(benchmark_config(self.folder, source))

    def planned(self, prompts: str) -> Any:
        config = sample_config(self.folder).model_copy(update={"prompts_uri": str(self.folder / prompts)})
        assert config.run is not None
        uri = find_checkpoint(config.run)
        return [prompt_hash(r.prompt) for r in plan_videos(config, config_of(read_facts(uri), uri), NOTHING)]

    def retrieved(self) -> Any:
        values = {
            "run": str(self.folder / "run"),
            "out": str(self.folder / "new"),
            "prompts": ["a red dog runs"],
        }
        more = {"memory": str(self.folder / "memory"), "retrieve": {"retriever": "bm25", "k": 2}}
        config = sample.SampleConfig.model_validate({**values, **more})
        memory = sample.check_retrieval(config)
        assert memory is not None
        return sample.retrieve(config, memory, ["a red dog runs"])

    def shown(self) -> Any:
        values = {"samples": [str(self.folder / "samples")], "scores": [str(self.folder / "scores")]}
        page = report(
            ReportConfig.model_validate({**values, "out": str(self.folder / "scratch" / "page.html")})
        )
        return Path(page).read_bytes()

    def commands(self) -> Commands:
        """Name -> (folders that it reads, what it does)."""
        return {
            "evaluate samples": (("samples", "prompts", "cache"), partial(self.evaluated, "samples")),
            "evaluate clips": (("clips", "videos", "prompts", "cache"), partial(self.evaluated, "clips")),
            "build-index": (("clips", "videos"), partial(self.embedded, "clips")),
            "build-index of captioned clips": (("captioned", "videos"), partial(self.embedded, "captioned")),
            "caption": (("clips", "videos"), self.captioned),
            "targets": (("clips", "videos"), self.targets),
            "redrive": (("clips",), self.redriven),
            "encode": (("prompts",), self.encoded),
            "training from encodings": (("encodings", "prompts"), self.stored),
            "benchmark of prompts": (("prompts",), partial(self.examined, "prompts")),
            "benchmark of clips": (("clips",), partial(self.examined, "clips")),
            "exclusion": (("bench",), lambda: read_exclusion(str(self.folder / "bench" / "exclude.jsonl"))),
            "sample": (("prompts",), partial(self.planned, "prompts")),
            "sample with a memory": (("memory",), self.retrieved),
            "sample of a benchmark": (("bench",), partial(self.planned, "bench")),
            "judge": (("world", "asked", "right"), self.judged),
            "report": (("samples", "scores"), self.shown),
            "report --evidence": (("judged",), self.opened),
        }


def artefacts(folder: Path) -> dict[str, list[Path]]:
    """Kind -> its files; the features that evaluate keeps are all of one kind."""
    cached = sorted(path for path in (folder / "cache").rglob("*") if path.is_file())
    return {**kinds(folder, FOLDERS), "cache": cached}


@pytest.fixture(scope="module")
def all_commands(folder: Path, tiny_encoder: dict[str, Any]) -> Commands:
    return Readers(folder, tiny_encoder).commands()


@pytest.fixture(scope="module")
def before(all_commands: Commands) -> dict[str, Any]:
    return {name: run() for name, (_, run) in all_commands.items()}


def test_every_kind_of_damage_is_refused_or_harmless(
    folder: Path, all_commands: Commands, before: dict[str, Any]
) -> None:
    refused: Counter[str] = Counter()
    for number, (kind, files) in enumerate(artefacts(folder).items()):
        spoilt = files[number % len(files)]
        found = assert_refused_or_harmless(folder, spoilt, number, all_commands, before)
        refused[kind.partition("/")[0]] += found
    assert set(+refused) == {*FOLDERS}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_of_damage_are_refused_or_harmless(
    folder: Path, all_commands: Commands, before: dict[str, Any]
) -> None:
    started_s, seed = time.monotonic(), 1000
    while time.monotonic() - started_s < float(os.environ.get("VIMI_FUZZ_S", "600")):
        for files in artefacts(folder).values():
            seed += 1
            assert_refused_or_harmless(folder, files[seed % len(files)], seed, all_commands, before)


@pytest.mark.parametrize("place", ["videos/video-0.mp4", "samples/sample-000.mp4"])
def test_a_video_that_changed_is_refused_by_name_and_trust_skips_the_look(
    folder: Path, all_commands: Commands, before: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    name = "evaluate samples" if place.startswith("samples") else "build-index"
    whole, run = (folder / place).read_bytes(), all_commands[name][1]
    try:
        (folder / place).write_bytes(whole + b"\0")
        with pytest.raises(DataError, match=f"{Path(place).name}.*(certified|crawl)"):
            run()
        monkeypatch.setenv(TRUST, "1")
        run()
    finally:
        (folder / place).write_bytes(whole)
