"""Embeds pictures and texts with CLIP: unit vectors, and token and patch states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.clip.preprocess import Picture, Preprocessing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BATCH_ROWS = 64
"""Rows per forward; more only helps on a GPU. Ours, from timings on 2 cores."""
CHARS_PER_TOKEN = 16
"""Texts are cut to this many characters per token of context: byte-pair merging is quadratic in a word."""


class Clip:
    """A frozen joint encoder. Vectors are float32 and of unit norm; rows keep their order.

    Build one with `infra.clip.load_clip`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        *,
        name: str,
        preprocessing: Preprocessing,
        context_length: int,
        device: str | torch.device,
        precision: str = "auto",
        batch_size: int = BATCH_ROWS,
    ) -> None:
        import torch

        from infra.clip.towers import can_trim, joint_dim

        self.weight_hash = hash_weights(model)
        self.device = torch.device(device)
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.model.visual.to(memory_format=torch.channels_last)
        self.name = name
        self.preprocessing = preprocessing
        self.context_length = context_length
        self.batch_size = batch_size
        self.dim = joint_dim(model)
        self.uses_bf16 = _uses_bf16(self.device, precision)
        if self.uses_bf16:
            _round_products(self.model)
        self._tokenize = tokenize
        self._can_trim = can_trim(model)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two sets of vectors comparable: name, weights and preprocessing."""
        return {
            "name": self.name,
            "weight_hash": self.weight_hash,
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "context_length": self.context_length,
            "dim": self.dim,
        }

    @cached_property
    def model_hash(self) -> str:
        """Hex sha256 of `identity`; equal on every machine."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def preprocess(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Pictures (PIL, or uint8 [h, w, 3]) -> uint8 [n, height, width, 3] at the model's size."""
        return self.preprocessing.batch(list(pictures))

    def encode_images(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Pictures (PIL, or uint8 [h, w, 3]) -> float32 [n, dim], unit rows."""
        out = np.empty((len(pictures), self.dim), np.float32)
        for rows in _batches(range(len(pictures)), self.batch_size):
            out[rows] = self.encode_pixels(self.preprocess([pictures[i] for i in rows]))
        return out

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [n, height, width, 3] from `preprocess` -> float32 [n, dim], unit rows."""
        from infra.clip.towers import image_vectors

        out = np.empty((len(pixels), self.dim), np.float32)
        for rows in _batches(range(len(pixels)), self.batch_size):
            with self._inference():
                batch = self.preprocessing.normalise(pixels[rows], self.device)
                out[rows] = _unit(image_vectors(self.model, batch))
        return out

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> float32 [n, dim], unit rows. Sorted by length inside, so that no padding is computed."""
        return self.encode_tokens(*self.tokenize(texts))

    def encode_tokens(self, ids: Tensor, lengths: Tensor) -> np.ndarray:
        """What `tokenize` gave -> float32 [n, dim], unit rows; may be called from several threads."""
        from infra.clip.towers import text_states

        out = np.empty((len(ids), self.dim), np.float32)
        for rows in _batches(_by_length(lengths), self.batch_size) if len(lengths) else ():
            with self._inference():
                pooled, _ = text_states(self.model, self._trimmed(ids, lengths, rows))
                out[rows] = _unit(pooled)
        return out

    def text_tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> states float32 [n, l, dim] and mask bool [n, l]; l is the longest of these texts."""
        import torch

        from infra.clip.towers import text_states

        ids, lengths = self.tokenize(texts)
        longest = int(lengths.max()) if len(texts) else 0
        states = torch.zeros(len(texts), longest, self.dim, device=self.device)
        for rows in _batches(_by_length(lengths), self.batch_size):
            with self._inference():
                _, some = text_states(self.model, self._trimmed(ids, lengths, rows))
                some = some[:, :longest].float()
            states[rows, : some.shape[1]] = some
        mask = torch.arange(longest)[None] < lengths[:, None]
        mask = mask.to(self.device)
        return states * mask[..., None], mask

    def image_tokens(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures -> patch states float32 [n, p, dim], row by row."""
        import torch

        from infra.clip.towers import image_states

        parts = []
        for rows in _batches(range(len(pictures)), self.batch_size):
            pixels = self.preprocess([pictures[i] for i in rows])
            with self._inference():
                batch = self.preprocessing.normalise(pixels, self.device)
                parts.append(image_states(self.model, batch, self.dim).float())
        return torch.cat(parts) if parts else torch.zeros(0, 1, self.dim, device=self.device)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids int64 [n, context] as open_clip's tokenizer gives them, and lengths [n]."""
        import torch

        from infra.clip.towers import text_lengths

        if not texts:
            return torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        limit = CHARS_PER_TOKEN * self.context_length
        short = [text if len(text) <= limit else " ".join(text.split())[:limit] for text in texts]
        ids = self._tokenize(short)
        return ids, text_lengths(self.model, ids)

    def _trimmed(self, ids: Tensor, lengths: Tensor, rows: list[int]) -> Tensor:
        batch = ids[rows]
        if self._can_trim:
            batch = batch[:, : int(lengths[rows].max())]
        return batch.to(self.device)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """`torch.inference_mode`, with bf16 autocast where it is used."""
        import torch

        bf16 = torch.autocast(self.device.type, torch.bfloat16) if self.uses_bf16 else nullcontext()
        with torch.inference_mode(), bf16:
            yield


def hash_weights(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hex sha256 over names, types, shapes and bytes of all weights, in name order.

    With `dtype`, floats are rounded to it first: equal for a model loaded in float32 or in bfloat16.
    """
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def _uses_bf16(device: torch.device, precision: str) -> bool:
    import torch

    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _round_products(model: nn.Module) -> None:
    """Hold the weights of matrix products in bf16, as autocast would round them anew at each forward.

    Autocast keeps its copies only of weights that are trained: a frozen ViT-B-32 would be rounded whole
    for every batch. Norms and embeddings stay float32.
    """
    import torch
    from torch import nn

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
        elif isinstance(module, nn.MultiheadAttention):
            for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if (weight := getattr(module, name)) is not None:
                    weight.data = weight.data.to(torch.bfloat16)


def _unit(vectors: Tensor) -> np.ndarray:
    import torch

    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


def _by_length(lengths: Tensor) -> list[int]:
    """Row numbers, longest first (the first batch then shows at once whether memory suffices)."""
    return lengths.argsort(descending=True, stable=True).tolist()


def _batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
