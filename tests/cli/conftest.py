"""What the tests of commands share: a tiny world, a run, and config values that each command accepts."""

from pathlib import Path
from typing import Any

import pytest

from infra.certificate import Certificate, write_certificate
from infra.claim import open_job
from infra.samples import write_samples
from pipeline.clips.crawl import CrawlConfig
from pipeline.world.make import WorldConfig
from pipeline.world.make import run as make_world
from tests.model.conftest import tiny_encoder as tiny_encoder
from tests.model.conftest import tiny_stage
from tests.model.conftest import trained_run as trained_run
from tests.model.prompt import tiny_mllms
from tests.model.prompt_tables import prompt_row, write_shards
from tests.pipeline.conftest import write_sound as write_sound
from tests.pipeline.conftest import write_video as write_video
from tests.pipeline.prompts.augment.conftest import world as world


def judged(folder: Path) -> dict[str, Any]:
    """A claim about samples of a world."""
    make_world(WorldConfig(out=str(folder / "world"), nouns=1, unseen=1, distractors=0))
    write_certificate(folder / "sampled", Certificate(job="sample", config_hash="0", num_in=0, num_out=0))
    write_samples(str(folder / "sampled"), [])
    sampled = {"samples": str(folder / "sampled"), "prompts": str(folder / "prompts")}
    claim = {"words": "it is so", "measure": "colour", "of": "one", "at_least": 0.5}
    where = {"world": str(folder / "world"), "out": str(folder / "judged")}
    return {**where, "sets": {"one": sampled}, "claims": [claim]}


@pytest.fixture(scope="session")
def legal(world: Any, trained_run: Any, tiny_encoder: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """Command -> config values that pass its preflight."""
    folder = tmp_path_factory.mktemp("numbers")
    rows = [prompt_row(n, num_frames=4, height=12, width=16) for n in range(12)]
    prompts = write_shards(folder / "prompts", rows, job="augment", group_rows=4, file_rows=16)
    tasks = ["subject_driven", "video_prediction", "text_to_video"]
    rows = [prompt_row(n, task=tasks[n % 3], num_frames=4, height=12, width=16) for n in range(12)]
    made = write_shards(folder / "instructions", rows, job="instruct", group_rows=4, file_rows=16)
    out, (stage, two) = (
        str(folder / "out"),
        (tiny_stage(p, folder / "run", tiny_encoder) for p in (prompts, made)),
    )
    videos = str(Path(world.rows[0]["local_uri"]).parent)
    crawl = {"sources": [{"kind": "folder", "path": videos, "name": "v"}], "out": out}
    here = CrawlConfig.load(options={**crawl, "out": world.clips})
    open_job(world.clips, job="crawl", config=here, inputs={})  # a crawl leaves its config there
    clips, offline = [world.clips], {"name": "offline"}
    captioner = str(folder / "llava")
    for part in tiny_mllms.made("llava"):
        part.save_pretrained(captioner)
    return {
        "vimi-data world": {"out": out},
        "vimi-data judge": judged(folder),
        "vimi-data crawl": crawl,
        "vimi-data redrive": {"clips": world.clips, "out": out},
        "vimi-data caption": {"clips": world.clips, "out": out, "model": captioner, "clip": offline},
        "vimi-data build-index": {"clips": clips, "out": out, "clip": offline},
        "vimi-data search": {"memory": world.memory, "text": "a dog", "retrieve": {"retriever": "bm25"}},
        "vimi-data plan": {},
        "vimi-data augment": {"clips": clips, "memory": world.memory, "out": out},
        "vimi-data benchmark": {"protocol": "own", "source": str(prompts), "out": out, "held_out_frac": 0.5},
        "vimi-data validate": {"prompts": str(prompts)},
        "vimi-data subjects": {"prompts": str(prompts), "out": out},
        "vimi-data instruct": {"prompts": str(prompts), "out": out},
        "vimi-data encode": {"prompts": str(prompts), "out": out, "encoder": tiny_encoder},
        "vimi-data report": {"out": out + ".html", "prompts": str(prompts)},
        "vimi-train stage1": stage,
        "vimi-train stage2": {**two, "start_from": trained_run.out},
        "vimi-train sample": {
            "run": trained_run.out,
            "prompts": ["a dog"],
            "out": out,
            "memory": world.memory,
            "num_steps": 2,
        },
        "vimi-train evaluate": {"videos": videos, "out": out, "metrics": ["flicker"]},
        "vimi-train export": {"run": trained_run.out, "out": out},
    }
