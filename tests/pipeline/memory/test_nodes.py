"""Three nodes of Ray on this machine, of which one is killed: the bytes are those of one node and one shard,
on a disk and in an object store.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.storage import exists, join, list_files, read_bytes
from pipeline.journal import JOURNAL, Receipts
from pipeline.memory import open_memory
from tests.pipeline.clip_tables import clip_row, picture, write_clips
from tests.pipeline.memory.test_build_index import tiny_clip

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[3]
JOBS = {
    "build": "pipeline.memory.build_index:BuildIndexConfig",
    "augment": "pipeline.prompts.augment:AugmentConfig",
}
COLUMNS = ["doc_id", "text", "image", "phash", "source_uri", "document_embedding"]
WAIT_S = 900


@pytest.fixture(params=["disk", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the nodes write; asked for before the cluster, whose nodes inherit the store's address."""
    if request.param == "disk":
        return str(tmp_path)
    request.getfixturevalue("s3_server")
    return "s3://bucket/vimi"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs and three nodes of one each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the nodes inherit it, as an image holds the code
    memory: dict[str, Any] = {"object_store_memory": 100_000_000}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    for _ in range(3):
        found.add_node(num_cpus=1, **memory)
    yield found
    found.shutdown()


def start(job: str, values: dict[str, Any], address: str | None = None) -> subprocess.Popen[bytes]:
    """The job in a process of its own, on the cluster at this address or on a node of its own."""
    module, name = JOBS[job].split(":")
    code = (
        f"import json, sys; from {module} import {name}, run; "
        f"run({name}.model_validate(json.loads(sys.argv[1])))"
    )
    places = {"PYTHONPATH": str(ROOT), **({"RAY_ADDRESS": address} if address else {})}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(values)], env=os.environ | places
    )


def kill_a_node(cluster: Any, job: subprocess.Popen[bytes], out: str, receipts: int) -> None:
    """Take a raylet and its workers away once the journal holds so many receipts; the job must end well."""
    until_s = time.monotonic() + WAIT_S
    while not exists(join(out, JOURNAL)) or len(Receipts(out)) < receipts:
        assert job.poll() is None and time.monotonic() < until_s
        time.sleep(0.05)
    assert job.poll() is None
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)
    assert job.wait(WAIT_S) == 0


def test_a_lost_node_changes_no_byte(folder: str, cluster: Any, tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "tiny").model_dump()
    rows = [clip_row(picture(tmp_path / f"{n}.png", n), f"a wave number {n}") for n in range(24)]
    clips = write_clips(tmp_path / "clips", rows)
    whole, cut = str(tmp_path / "whole"), join(folder, "cut")
    build = {"clips": [clips], "clip": clip, "rows_per_unit": 1}
    assert start("build", build | {"out": whole}).wait(WAIT_S) == 0
    job = start("build", build | {"out": cut, "shard_rows": 4}, cluster.address)
    kill_a_node(cluster, job, join(cut, "build"), 8)
    one, other = open_memory(whole), open_memory(cut)
    assert len(one.shards) == 1 and len(other.shards) == 6 and one.version == other.version
    assert one.take(range(24), COLUMNS).equals(other.take(range(24), COLUMNS))

    prompts = {"clips": clips, "retrieve": {"retriever": "hybrid", "k": 3, "depth": 5}, "shard_rows": 1}
    made = [str(tmp_path / "prompts"), join(folder, "prompts-cut")]
    assert start("augment", prompts | {"memory": whole, "out": made[0]}).wait(WAIT_S) == 0
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    job = start("augment", prompts | {"memory": cut, "out": made[1]}, cluster.address)
    kill_a_node(cluster, job, made[1], 6)
    whole_bytes, cut_bytes = (
        {Path(f).name: read_bytes(f) for f in list_files(out, suffix=".parquet")} for out in made
    )
    assert len(whole_bytes) == 26 and whole_bytes == cut_bytes
