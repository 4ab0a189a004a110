"""Features of one video and of its prompt: from the cache, else by the networks that are still missing.

The cache is a folder that any number of evaluations and workers share. It keeps features by what they are a
function of: the video's bytes, the network, and what it saw of the video. One small file each,
`ab/abcdef....npy`, with the hash of its own bytes: a damaged one counts as absent.
"""

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from PIL import Image

from infra.config import canonical_json
from infra.errors import DataError
from infra.pictures import decode_picture
from infra.storage import join, read_bytes, write_bytes
from model.evaluate.networks import NETWORKS, Network, NetworkConfig, network_of, opener

Keys = dict[str, str]
"""Feature -> its key in the cache."""
MAX_REFERENCES = 8
"""Reference pictures of a prompt that are looked at, and their words that are looked for. Ours."""


class FeatureCache:
    """Features in a folder; see above."""

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


class Extractor:
    """Gives features by the names that metrics ask for, and keeps them.

    `names` are features such as `i3d`, `clip`, `clip_text`; `seen` are plain values that say which frames the
    networks are given.
    """

    def __init__(
        self,
        config: NetworkConfig,
        names: Sequence[str],
        cache: FeatureCache,
        seen: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.config, self.names, self.cache = config, names, cache
        self.seen = {**seen, "device": device.type}  # another processor rounds otherwise
        self.network: Callable[[str], Network] = opener(config, device)

    @property
    def of_videos(self) -> list[str]:
        return [name for name in self.names if name in NETWORKS]

    @property
    def reads_pictures(self) -> bool:
        """Whether any feature is of reference pictures."""
        return any(name.endswith("_references") for name in self.names)

    def identities(self) -> dict[str, dict[str, Any]]:
        """Of all networks behind the features."""
        return {name: self.network(name).identity for name in sorted({network_of(n) for n in self.names})}

    def video_keys(self, video_id: str, words: Sequence[str] = (), only: Collection[str] | None = None) -> Keys:
        """Keys of a video's features.

        Args:
            video_id: what its frames are a function of: the sha256 of its bytes, and the part of them.
            words: that name the subjects of its prompt's reference pictures, in their order; as many count as
                pictures do.
            only: the features that are wanted; None = all.
        """
        return {
            name: FeatureCache.key(
                video_id, name, self.network(name).identity, self.seen, *_words_of(name, words)
            )
            for name in self.of_videos
            if (words or not NETWORKS[name].reads_words) and (only is None or name in only)
        }

    def missing(self, keys: Keys) -> list[str]:
        return [name for name, key in keys.items() if self.cache.get(key) is None]

    def video(self, keys: Keys, missing: Sequence[str], frames: np.ndarray, words: Sequence[str] = ()) -> None:
        """Compute and keep the missing features of uint8 `t h w 3` frames."""
        for name in missing:
            network = self.network(name)
            wanted = words[:MAX_REFERENCES]
            found = network.about(frames, wanted) if network.reads_words else network(frames)
            self.cache.put(keys[name], found)

    def text(self, text: str) -> Keys:
        """Keys of the features of a prompt's words, computed where they are missing."""
        found = {}
        for name in self.names:
            if name.endswith("_text"):
                network = self.network(network_of(name))
                found[name] = self._keep([text, network.identity], lambda n=network: n.texts([text])[0])
        return found

    def references(self, pictures: Sequence[bytes]) -> Keys:
        """Keys of the features of a prompt's reference pictures; none without pictures.

        Raises:
            PictureError: one of them is no picture.
        """
        found, some = {}, list(pictures)[:MAX_REFERENCES]
        digests = [sha256(picture).hexdigest() for picture in some]
        for name in self.names if some else ():
            if name.endswith("_references"):
                network = self.network(network_of(name))
                parts = [digests, network.identity]
                found[name] = self._keep(parts, lambda n=network: n.pictures([opened(p) for p in some]))
        return found

    def _keep(self, parts: Any, compute: Callable[[], np.ndarray]) -> str:
        key = FeatureCache.key(parts, self.seen["device"])
        if self.cache.get(key) is None:
            self.cache.put(key, compute())
        return key


def _words_of(name: str, words: Sequence[str]) -> list[list[str]]:
    return [list(words[:MAX_REFERENCES])] if NETWORKS[name].reads_words else []


def opened(picture: bytes) -> Image.Image:
    """A reference as the generator sees it: upright, transparent parts on white."""
    return decode_picture(io.BytesIO(picture), on_white=True)
