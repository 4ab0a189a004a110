"""CLIP prompt encoder: text tokens and picture patches, in the order of the prompt's segments.

Each text and each picture is encoded by itself: unlike a language model's, these tokens have not seen
their neighbours; the generator's attention has to relate them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infra.clip import Clip
from model.condition import EncodedPrompt, Prompt
from model.prompt.encoder import PromptEncoder, PromptEncoderConfig, join
from model.prompt.pictures import MAX_PICTURE_PX, Pictures, decode_all
from model.prompt.select import drop_empty, fit


class ClipPromptEncoder(PromptEncoder):
    """Prompt encoder over `infra.clip.Clip`."""

    def __init__(self, config: PromptEncoderConfig, clip: Clip) -> None:
        self.config = config
        self.clip = clip
        self.dim = clip.dim
        self.dtype = torch.float32
        self._tokens_per_picture: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "clip",
            "clip": self.clip.identity,
            "max_tokens": self.config.max_tokens,
            "patch_grid": self.config.patch_grid,
            "bad_pictures": "refuse",
            "max_picture_px": MAX_PICTURE_PX,
            **self.config.token_version,
        }

    @property
    def arithmetic(self) -> dict[str, Any]:
        return {"bf16": self.clip.uses_bf16, "dtype": str(self.dtype), "device": self.clip.device.type}

    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        decoded: Pictures = {}
        prompts = [self._fitted(prompt, decoded) for prompt in prompts]
        texts = self._encode_texts(prompts)
        pictures = self._encode_pictures(prompts, decoded)
        return [
            join(
                [
                    (place, s.role, texts[s.text or ""] if s.type == "text" else pictures[s.image or b""])
                    for place, s in drop_empty(prompt)
                ],
                self.dim,
                self.dtype,
            )
            for prompt in prompts
        ]

    def _fitted(self, prompt: Prompt, decoded: Pictures) -> Prompt:
        decode_all(prompt, decoded)
        return fit(prompt, self.config.max_tokens, self._count)

    def _encode_texts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Tokens `l e` of each different text."""
        texts = {s.text or "" for p in prompts for _, s in drop_empty(p) if s.type == "text"}
        if not texts:
            return {}
        ordered = sorted(texts)
        states, mask = self.clip.text_tokens(ordered)
        return {text: states[row][mask[row]] for row, text in enumerate(ordered)}

    def _encode_pictures(self, prompts: Sequence[Prompt], decoded: Pictures) -> dict[bytes, Tensor]:
        """Tokens `p e` of each different picture."""
        found = {s.image or b"" for p in prompts for _, s in drop_empty(p) if s.type == "image"}
        if not found:
            return {}
        ordered = sorted(found)
        states = self.clip.image_tokens([decoded[data] for data in ordered])
        states = pool_patches(states, self.config.patch_grid)
        return dict(zip(ordered, states, strict=True))

    def _count(self, prompt: Prompt) -> int:
        segments = [segment for _, segment in drop_empty(prompt)]
        texts = [s.text or "" for s in segments if s.type == "text"]
        _, lengths = self.clip.tokenize(texts)
        num_pictures = len(segments) - len(texts)
        return int(lengths.sum()) + (self._picture_tokens() * num_pictures if num_pictures else 0)

    def _picture_tokens(self) -> int:
        if self._tokens_per_picture is None:
            import numpy as np

            blank = np.zeros((*self.clip.preprocessing.size, 3), np.uint8)
            states = pool_patches(self.clip.image_tokens([blank]), self.config.patch_grid)
            self._tokens_per_picture = states.shape[1]
        return self._tokens_per_picture


def pool_patches(states: Tensor, grid: int | None) -> Tensor:
    """Average patches `n p e` over a square map to at most `grid x grid` of them."""
    n, p, e = states.shape
    side = round(p**0.5)
    if grid is None or grid >= side or side * side != p:
        return states
    maps = states.transpose(1, 2).reshape(n, e, side, side)
    # One by one: pooled in a batch, the last bits of a picture depend on its neighbours.
    pooled = [torch.nn.functional.adaptive_avg_pool2d(one.contiguous(), grid) for one in maps]
    return torch.stack(pooled).flatten(2).transpose(1, 2)
