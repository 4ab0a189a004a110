"""Keeps features by what they are a function of: the video's bytes, the network, and what it saw of the video.

One small file each, `ab/abcdef....npy`, with the hash of its own bytes: a damaged one counts as absent.
"""

import io
from hashlib import sha256
from typing import Any

import numpy as np

from infra.config import canonical_json
from infra.errors import DataError
from infra.storage import join, read_bytes, write_bytes


class FeatureCache:
    """Features in a folder that any number of evaluations and workers share."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @staticmethod
    def key(*parts: Any) -> str:
        """Of plain values that decide the features."""
        return sha256(canonical_json(parts)).hexdigest()

    def get(self, key: str) -> np.ndarray | None:
        """The features; None where there are none, or damaged ones."""
        try:
            data = read_bytes(self._place(key))
        except FileNotFoundError:
            return None
        digest, body = data[:32], data[32:]
        if sha256(body).digest() != digest:
            return None
        return np.load(io.BytesIO(body), allow_pickle=False)

    def require(self, key: str) -> np.ndarray:
        """The features that a worker has put here.

        Raises:
            DataError: they are gone.
        """
        found = self.get(key)
        if found is None:
            raise DataError(
                f"features {key[:12]}... are gone from {self.folder} or damaged; cure: delete the journal "
                "folder of the output and run the same command again"
            )
        return found

    def put(self, key: str, features: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, features, allow_pickle=False)
        body = buffer.getvalue()
        write_bytes(self._place(key), sha256(body).digest() + body)

    def _place(self, key: str) -> str:
        return join(self.folder, key[:2], f"{key}.npy")
