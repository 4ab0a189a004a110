"""Laws of Ray's metrics: what jobs and trainings count is at the endpoint, by the names that Grafana asks."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from infra.telemetry import JobMetrics, RunMetrics
from model.training.metrics import RayGauges
from pipeline.schema import Status

ROOT = Path(__file__).parents[2]


def asked_by_grafana() -> set[str]:
    """Names of our metrics in the dashboard's queries."""
    panels = json.loads((ROOT / "infra/grafana/vimi.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return set(re.findall(r"ray_vimi_\w+", " ".join(queries)))


def test_the_panel_of_failed_rows_counts_failures_alone() -> None:
    """Not what is good, and not what was left out on purpose; every label is a status of the schema."""
    panels = json.loads((ROOT / "infra/grafana/vimi.json").read_text())["panels"]
    query = next(p["targets"][0]["expr"] for p in panels if p["title"].startswith("Failed rows"))
    found = re.search(r'ray_vimi_rows_total\{status!~"([^"]+)"\}', query)
    assert found is not None
    assert {s for s in Status if not re.fullmatch(found[1], s)} == {s for s in Status if s.is_dead}


@pytest.mark.ray
def test_grafana_asks_for_what_ray_exports(ray_cluster: None) -> None:
    import ray

    JobMetrics("crawl").add(2, {"ok": 7, "timeout": 1})
    gauges = RayGauges("/runs/one")
    gauges.write(640, dict.fromkeys(RunMetrics.NAMES, 0.5) | {"data_s": 0.1})
    gauges.write(320, {"val/loss video retrieval on": 0.7})  # a late validation does not turn the run back
    node = ray.nodes()[0]
    endpoint = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
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
    assert value_of(found, "ray_vimi_train_validation_loss", of="video retrieval on") == 0.7


def value_of(found: dict[str, str], name: str, **tags: str) -> float:
    labels = [f'{key}="{value}"' for key, value in tags.items()]
    values = [float(v) for k, v in found.items() if k.startswith(name + "{") and all(t in k for t in labels)]
    assert len(values) == 1, found
    return values[0]
