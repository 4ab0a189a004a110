"""Encoded prompts, kept by content: in memory (least recently used goes) and in a folder or bucket.

The key is a hash of all that the tokens depend on: the encoder's identity (weights, tokenizer,
preprocessing, layer, limits, arithmetic) and, for every segment of the prompt as it is *after* `select`,
its type, role, text and picture bytes. Nothing else goes in, so an entry can't be stale, only unused.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch

from infra.storage import absolute, join, read_bytes, write_bytes
from model.condition import Prompt
from model.prompt.config import CacheConfig
from model.prompt.encoder import EncodedPrompt, PromptEncoder


def prompt_key(encoder_hash: str, prompt: Prompt) -> str:
    """Hex sha256 over the encoder's `content_hash` and the prompt; every part is length-prefixed."""
    digest = sha256()

    def add(part: bytes | None) -> None:
        digest.update(b"\0" if part is None else b"\1" + len(part).to_bytes(8, "little"))
        digest.update(part or b"")

    add(encoder_hash.encode())
    for segment in prompt:
        add(segment.type.encode())
        add(segment.role.encode())
        add(None if segment.text is None else segment.text.encode("utf-8", "surrogatepass"))
        add(segment.image)
    return digest.hexdigest()


class EncodingCache:
    """Key -> EncodedPrompt. Safe for threads; a damaged or half-written entry reads as absent."""

    def __init__(self, *, memory_bytes: int, uri: str | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.uri = absolute(uri) if uri else None
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, config: CacheConfig) -> "EncodingCache":
        return cls(memory_bytes=config.memory_bytes, uri=config.uri)

    def get(self, key: str) -> EncodedPrompt | None:
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        if found is None and self.uri:
            found = _read(self._place(key), key)
            if found is not None:
                self._keep(key, found)
        with self._lock:
            self.hits += found is not None
            self.misses += found is None
        return found

    def put(self, key: str, prompt: EncodedPrompt) -> None:
        self._keep(key, prompt)
        if self.uri:
            write_bytes(self._place(key), _pack(key, prompt))

    def _keep(self, key: str, prompt: EncodedPrompt) -> None:
        if prompt.num_bytes > self.memory_bytes:
            return
        with self._lock:
            old = self._kept.pop(key, None)
            self._kept_bytes += prompt.num_bytes - (old.num_bytes if old else 0)
            self._kept[key] = prompt
            while self._kept_bytes > self.memory_bytes:
                _, out = self._kept.popitem(last=False)
                self._kept_bytes -= out.num_bytes

    def _place(self, key: str) -> str:
        assert self.uri is not None
        return join(self.uri, key[:2], f"{key}.safetensors")


class CachedPromptEncoder(PromptEncoder):
    """Asks the cache first; equal prompts of one call are encoded once."""

    def __init__(self, encoder: PromptEncoder, cache: EncodingCache) -> None:
        self.encoder = encoder
        self.cache = cache
        self.dim = encoder.dim
        self.dtype = encoder.dtype

    @property
    def identity(self) -> dict[str, Any]:
        return self.encoder.identity

    @property
    def arithmetic(self) -> dict[str, Any]:
        return self.encoder.arithmetic

    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        keys = [prompt_key(self.content_hash, prompt) for prompt in prompts]
        found = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        wanted = {key: p for key, p in zip(keys, prompts, strict=True) if found[key] is None}
        made = self.encoder.encode_each(list(wanted.values()))
        for key, encoded in zip(wanted, made, strict=True):
            self.cache.put(key, encoded)
            found[key] = encoded
        return [encoded for key in keys if (encoded := found[key]) is not None]


def _pack(key: str, prompt: EncodedPrompt) -> bytes:
    from safetensors.torch import save

    tensors = {name: value.contiguous() for name, value in vars(prompt).items()}
    return save(tensors, metadata={"key": key, "sha256": _checksum(tensors)})


def _read(place: str, key: str) -> EncodedPrompt | None:
    """The entry at `place`; None when absent, damaged, or of another key."""
    import json

    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = read_bytes(place)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tensors = load(data)
    except (OSError, ValueError, SafetensorError, MemoryError):
        return None
    facts = header.get("__metadata__", {})
    if facts.get("key") != key or facts.get("sha256") != _checksum(tensors):
        return None
    return EncodedPrompt(**tensors)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
