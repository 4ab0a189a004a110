"""Fixtures of the whole suite: one Ray cluster a session, real files, the optional real assets."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray session for all tests that need one; jobs inside find it initialised."""
    from infra.cluster import RayConfig, ray_session

    with ray_session(RayConfig(num_cpus=int(os.environ.get("VIMI_TEST_CPUS", "2")))):
        yield


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real clips, images and weights beside the checkout; tests that need them skip without."""
    folder = ROOT.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("no ../shared/assets beside this checkout")
    return folder
