import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from infra.cluster import RayConfig, may_use_gpu, ray_session
from infra.errors import ConfigError, VimiError

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


def test_nodes_of_the_cluster_file_reach_storage_and_hold_the_image_and_the_spill() -> None:
    nodes = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]
    for name, node in nodes.items():
        assert node["node_config"]["IamInstanceProfile"], name
        (disk,) = node["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 200, name


def test_kubernetes_files_give_gpu_workers_their_node_and_run_a_job() -> None:
    cluster = yaml.safe_load((ROOT / "infra/kuberay/raycluster.yaml").read_text())
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster["spec"]["workerGroupSpecs"]}
    (container,) = groups["gpu"]["containers"]
    cpus, whole = float(container["resources"]["limits"]["cpu"]), 192  # of p5.48xlarge
    assert whole - 4 <= cpus < whole and container["resources"]["limits"] == container["resources"]["requests"]
    assert {t["key"] for t in groups["gpu"]["tolerations"]} == {"nvidia.com/gpu"}
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    assert all(spec["serviceAccountName"] == "vimi" for spec in (head, *groups.values()))
    job = yaml.safe_load((ROOT / "infra/kuberay/rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == (cluster["apiVersion"], "RayJob")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    config = job["spec"]["entrypoint"].rpartition("/opt/vimi/")[2]
    assert (ROOT / config).is_file()


def test_the_image_does_not_run_as_root() -> None:
    lines = (ROOT / "infra/docker/Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] not in ("root", "0")


def test_a_ray_that_does_not_start_or_answer_is_a_line_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(VimiError, match=r"^Ray did not start in time; cure: [^\n]*$"), ray_session(RayConfig()):
        pass

    def nobody(**_: object) -> None:
        raise ConnectionError("no\nbody")

    monkeypatch.setattr(ray, "init", nobody)
    there = ray_session(RayConfig(address="10.0.0.1:6379"))
    with pytest.raises(ConfigError, match=r"^no Ray cluster answers .*cure: [^\n]*$"), there:
        pass

    def stranger(**_: object) -> None:
        raise AuthenticationError("no token")

    monkeypatch.setattr(ray, "init", stranger)
    there = ray_session(RayConfig(address="10.0.0.1:6379"))
    with pytest.raises(ConfigError, match=r"^the Ray cluster .* token.*cure: [^\n]*$"), there:
        pass


JOIN = """
import sys
import ray
from infra.cluster import RayConfig, ray_session
from infra.errors import ConfigError
try:
    with ray_session(RayConfig(address=sys.argv[1])):
        print("joined", ray.cluster_resources()["CPU"])
except ConfigError as error:
    print(error)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_asks_for_its_token_is_joined_by_those_who_bring_it(tmp_path: Path) -> None:
    """As docs/cluster.md says: the token alone is not enough, and what is missing is said in a line."""
    token = {"RAY_AUTH_TOKEN": "a" * 40}
    both = {"RAY_AUTH_MODE": "token", **token}
    base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    base |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1"]
    start += [
        f"--port={address.partition(':')[2]}",
        "--include-dashboard=false",
        "--object-store-memory=100000000",
    ]

    def join(**env: str) -> str:
        command = [sys.executable, "-c", JOIN, address]
        return subprocess.run(command, env=base | env, capture_output=True, text=True, timeout=240).stdout

    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # sockets want short paths
        head = subprocess.Popen([*start, f"--temp-dir={folder}"], env=base | both, stdout=subprocess.DEVNULL)
        try:
            deadline_s = time.monotonic() + 240
            while "joined 1.0" not in (said := join(**both)):
                assert time.monotonic() < deadline_s and head.poll() is None, said
            assert "asks for its token, which is not here; cure:" in join(RAY_AUTH_MODE="token")
            for wrong in ({}, token, both | {"RAY_AUTH_TOKEN": "b" * 40}):
                assert re.fullmatch(
                    "no Ray cluster answers at .*; cure: .*RAY_AUTH_MODE=token.*\n", join(**wrong)
                )
        finally:
            head.terminate()
            head.wait(60)


@pytest.mark.ray
def test_a_worker_that_asked_for_no_gpu_takes_none(ray_cluster: None) -> None:
    """Ray hides no GPU from it."""
    import ray

    assert may_use_gpu()
    assert not ray.get(ray.remote(num_gpus=0)(may_use_gpu).remote())


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
