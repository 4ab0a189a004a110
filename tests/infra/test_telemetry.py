"""Laws of Ray's metrics: what jobs and trainings count is at the endpoint, by the names that Grafana asks."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote

import pytest

from infra.telemetry import JobMetrics, RunMetrics
from infra.validation_cells import Cell
from model.training.metrics import RayGauges
from pipeline.clips.crawl import CrawlConfig, run
from pipeline.clips.filters import FilterConfig
from pipeline.schema import Status
from tests.pipeline.conftest import write_video  # noqa: F401 # pyright: ignore[reportUnusedImport]

ROOT = Path(__file__).parents[2]
WAIT_S = 90
VALIDATED = [
    Cell("video", "right").name,
    Cell("video", "right", 0.9).name,
    Cell("video", "none", 0.9, is_gain=True).name,
    Cell("video", "none", 0.9, is_gain=True, is_error=True).name,
]
"""A number of validation for each query of the dashboard."""


def queries() -> dict[str, list[str]]:
    """Panel of the dashboard -> its queries."""
    panels = json.loads((ROOT / "infra/grafana/vimi.json").read_text())["panels"]
    return {panel["title"]: [target["expr"] for target in panel.get("targets", [])] for panel in panels}


def asked_by_grafana() -> set[str]:
    """Names of our metrics in the dashboard's queries."""
    return set(re.findall(r"ray_vimi_\w+", json.dumps(queries())))


def metrics_endpoint() -> str:
    """host:port of what this session's node exports."""
    import ray

    node = ray.nodes()[0]
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


def test_the_panel_of_failed_rows_counts_failures_alone() -> None:
    """Not what is good, and not what was left out on purpose; every label is a status of the schema."""
    (query,) = queries()["Failed rows, in total"]
    found = re.search(r'ray_vimi_rows_total\{status!~"([^"]+)"\}', query)
    assert found is not None
    assert {s for s in Status if not re.fullmatch(found[1], s)} == {s for s in Status if s.is_dead}


@pytest.mark.ray
def test_grafana_asks_for_what_ray_exports(ray_cluster: None) -> None:
    JobMetrics("crawl").add(2, {"ok": 7, "timeout": 1})
    gauges = RayGauges("/runs/one")
    gauges.write(640, dict.fromkeys(RunMetrics.NAMES, 0.5) | {"data_s": 0.1})
    late = dict(zip(VALIDATED, (0.7, 0.9, 0.2, 0.05), strict=True))
    gauges.write(320, late)  # does not turn the run back
    endpoint = f"http://{metrics_endpoint()}/metrics"
    wanted, found = asked_by_grafana(), {}
    for _ in range(60):  # a process reports twice a second here
        text = urllib.request.urlopen(endpoint, timeout=10).read().decode()
        found = dict(re.findall(r"^(ray_vimi_\w+\{.*\}) (\S+)$", text, re.MULTILINE))
        if wanted <= {name.partition("{")[0] for name in found}:
            break
        time.sleep(0.5)
    assert wanted <= {name.partition("{")[0] for name in found}
    assert value_of(found, "ray_vimi_rows_total", vimi_job="crawl", status="ok") >= 7
    assert value_of(found, "ray_vimi_train_samples", run="/runs/one") == 640
    assert value_of(found, "ray_vimi_train_step_s", run="/runs/one", part="data") == 0.1
    loss, gain = "ray_vimi_train_validation_loss", "ray_vimi_train_validation_gain"
    assert value_of(found, loss, of="video", documents="right", noise="all") == 0.7
    assert value_of(found, loss, of="video", documents="right", noise="q0.9") == 0.9
    assert value_of(found, gain, of="video", documents="none", noise="q0.9") == 0.2
    assert value_of(found, f"{gain}_error", of="video", documents="none", noise="q0.9") == 0.05


def value_of(found: dict[str, str], name: str, **tags: str) -> float:
    labels = [f'{key}="{value}"' for key, value in tags.items()]
    values = [float(v) for k, v in found.items() if k.startswith(name + "{") and all(t in k for t in labels)]
    assert len(values) == 1, found
    return values[0]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """Address of a real Prometheus that scrapes `target` each second."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    scrape = [{"job_name": "ray", "static_configs": [{"targets": [target]}]}]
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": scrape}
    folder.mkdir()
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([program, *flags, f"--web.listen-address={place}"], stderr=log, stdout=log)
        try:
            yield f"http://{place}"
        finally:
            server.terminate()
            server.wait(30)


def ask(server: str, query: str) -> list[dict[str, Any]]:
    """The series that answer a query now: labels (`metric`) and (time, `value`)."""
    try:
        answer = urllib.request.urlopen(f"{server}/api/v1/query?query={quote(query)}", timeout=10)
    except (URLError, ConnectionError):  # it is still starting
        return []
    return json.loads(answer.read())["data"]["result"]


@pytest.mark.ray
@pytest.mark.slow
def test_each_panel_shows_a_series_and_the_failed_rows_of_a_crawl(
    ray_cluster: None,
    tmp_path: Path,
    write_video: Any,  # noqa: F811
) -> None:
    corpus = tmp_path / "corpus"
    for number in range(2):
        write_video(corpus / f"{number}.mp4", num_frames=8, fps=8, seed=number)
    write_video(corpus / "small.mp4", num_frames=8, fps=8, size_px=(32, 32))
    (corpus / "torn.mp4").write_bytes((corpus / "0.mp4").read_bytes()[:300])
    asked = {query for panel in queries().values() for query in panel}
    with prometheus(tmp_path / "prometheus", metrics_endpoint()) as server:
        source, filters = {"kind": "folder", "path": str(corpus)}, FilterConfig(require_caption=False)
        options = {"sources": [source], "out": str(tmp_path / "clips"), "max_failed_frac": 0.9}
        certificate = run(CrawlConfig.load(options=options | {"filters": filters.model_dump()}))
        gauges = RayGauges("/runs/one")
        of_training = dict.fromkeys((*RunMetrics.NAMES, "data_s"), 0.5)
        gauges.write(640, of_training | dict.fromkeys(VALIDATED, 0.1))
        if not asks_of_gpus():
            asked -= set(queries()["GPU utilisation"])
        deadline_s = time.monotonic() + WAIT_S
        while silent := {query for query in asked if not ask(server, query)}:
            assert time.monotonic() < deadline_s, silent
            time.sleep(1)
        (failed,) = queries()["Failed rows, in total"]
        found = [series for series in ask(server, failed) if series["metric"]["vimi_job"] == "crawl"]
        counts = {series["metric"]["status"]: float(series["value"][1]) for series in found}
        rows = ask(server, "sum by (vimi_job, status) (ray_vimi_rows_total)")
        seen = {series["metric"]["status"] for series in rows if series["metric"]["vimi_job"] == "crawl"}
    assert certificate.dead == {"undecodable": 1} and sum(certificate.filtered.values()) == 1
    assert counts["undecodable"] == 1
    assert {"ok", *certificate.filtered} <= seen and not {"ok", *certificate.filtered} & set(counts)


def asks_of_gpus() -> bool:
    """Is there a GPU whose load Ray exports? By which name, its own list says."""
    import torch
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    assert "node_gpus_utilization" in METRICS_GAUGES
    assert "ray_node_gpus_utilization" in queries()["GPU utilisation"][0]
    return torch.cuda.is_available()
