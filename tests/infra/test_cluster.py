import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

SHADOW_SCRIPT = """
import ray
from infra.cluster import RayConfig, ray_session

def where():
    import infra, model, pipeline, pipeline.schema
    return [module.__file__ or list(module.__path__) for module in (infra, model, pipeline, pipeline.schema)]

with ray_session(RayConfig(num_cpus=1)):
    print(ray.get(ray.remote(where).remote()))
"""


@pytest.mark.ray
def test_a_users_own_model_and_pipeline_folders_do_not_shadow_ours(tmp_path: Path) -> None:
    for name in ("model", "pipeline", "infra"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(SHADOW_SCRIPT)
    # As the installed commands run: a script of another folder, standing in the user's folder.
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert str(tmp_path) not in result.stdout
    assert result.stdout.count(str(ROOT)) == 4


def test_no_other_distribution_claims_our_package_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in ("pipeline", "model", "cli", "infra"):
        assert set(owners.get(name, ())) <= {"vimi"}


def test_cluster_file_satisfies_rays_own_schema_and_starts_the_dashboard() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
    validate_config(config)
    assert any("--include-dashboard=true" in line for line in config["head_start_ray_commands"])
    assert config["head_node_type"] in config["available_node_types"]


def test_image_brings_what_the_cluster_file_asks_for() -> None:
    """Without its packages `--include-dashboard=true` ends the head node; boto3 is how it asks for workers."""
    from ray._private.utils import get_dashboard_dependency_error

    assert get_dashboard_dependency_error() is None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(line.startswith("ray[") and "default" in line for line in project["dependencies"])
    assert project["optional-dependencies"]["cluster"] == ["boto3"]
    assert "-e '.[offline,cluster]'" in (ROOT / "infra/docker/Dockerfile").read_text()


def test_kubernetes_file_names_the_tested_ray() -> None:
    spec = yaml.safe_load((ROOT / "infra" / "kuberay" / "raycluster.yaml").read_text())["spec"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert spec["rayVersion"] == pins["ray"]


def test_import_of_the_ground_stays_light() -> None:
    code = "import sys, infra.config, infra.storage, infra.cluster, pipeline.schema; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ},
    ).stdout.split()
    assert not {"torch", "ray", "transformers", "lancedb", "av", "matplotlib"} & set(loaded)
