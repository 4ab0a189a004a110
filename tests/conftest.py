"""Fixtures of the whole suite: one Ray cluster a session, real files, the optional real assets."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from hypothesis import settings

# One thread a process: two processes with two threads each wait for one another over tiny tensors, and take
# three times the processor's time. Read when torch and NumPy are first imported; Ray's workers inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("no clock", deadline=None)  # a slow machine is not a broken law
settings.load_profile("no clock")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray session for all tests that need one; jobs inside find it initialised."""
    from infra.cluster import RayConfig, ray_session

    os.environ.setdefault("RAY_metrics_report_interval_ms", "500")  # ten seconds are Ray's
    with ray_session(RayConfig(num_cpus=int(os.environ.get("VIMI_TEST_CPUS", "2")))):
        yield


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real clips, images and weights beside the checkout; tests that need them skip without."""
    folder = ROOT.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("no ../shared/assets beside this checkout")
    return folder


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real S3-compatible server on loopback with a few buckets; the environment points pyarrow at it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = pafs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
    for bucket in ("bucket", "corpus", "memories", "runs"):
        store.create_dir(bucket)
    yield f"http://{host}:{port}"
    server.stop()
