"""One row of encodings: packed to bytes, found again by content.

Every variant of a prompt is named by the hash that `model.prompt.cache` uses: of the encoder and of the
prompt's own text and pictures. A latent is named by the autoencoder, the target's bytes and the bucket. So
what is found belongs to what was asked for, or nothing is found.

Variants share most of their tokens (a CLIP's all of them), so tokens are kept as blocks, one a segment, each
once a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infra.config import canonical_json
from infra.errors import DataError
from model.prompt.cache import prompt_key
from model.prompt.encoder import EncodedPrompt

if TYPE_CHECKING:
    from model.condition import Prompt
    from model.data.buckets import Bucket


@dataclass(frozen=True)
class Facts:
    """What the tokens and latents of a folder are.

    Attributes:
        encoder: identity hash of the prompt encoder.
        encoder_content: its content hash: identity and arithmetic.
        dim: width of the tokens.
        dtype: of the tokens, as torch names it ("float32").
        autoencoder_content: content hash of the autoencoder; None when only prompts are encoded.
        space: fields of `model.space.Space`.
    """

    encoder: str
    encoder_content: str
    dim: int
    dtype: str
    autoencoder_content: str | None
    space: dict[str, Any]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def latents_key(autoencoder_content: str, row: Mapping[str, Any], bucket: "Bucket") -> str:
    """Hex sha256 of all that a row's latents depend on.

    A reference's bytes lie elsewhere: it is named by its parent's hash, or its path where that is unknown.
    """
    target = row["target"]
    parent = row["source_sha256"] or row["source_uri"]
    place = [parent, row["start_s"], row["end_s"]] if target["kind"] == "reference" else []
    described = [target["kind"], target["num_frames"], target["height_px"], target["width_px"]]
    digest = sha256(canonical_json([autoencoder_content, bucket.name, described, str(target["fps"]), place]))
    digest.update(b"" if target["data"] is None else target["data"])
    return digest.hexdigest()


def pack_prompts(encoded: Mapping[str, EncodedPrompt]) -> dict[str, list[dict[str, Any]]]:
    """Columns `blocks` and `variants` of a row, from key -> encoded variant."""
    places: dict[bytes, int] = {}
    variants = []
    for key, prompt in encoded.items():
        lengths = _runs(prompt.segment)
        firsts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
        data = [to_bytes(part) for part in prompt.tokens.split(lengths)] if lengths else []
        variants.append(
            {
                "key": key,
                "blocks": [places.setdefault(block, len(places)) for block in data],
                "roles": [int(prompt.role[first]) for first in firsts],
                "segments": [int(prompt.segment[first]) for first in firsts],
            }
        )
    return {"blocks": [{"data": block} for block in places], "variants": variants}


def _runs(segments: Tensor) -> list[int]:
    """Lengths of the runs of equal values."""
    return torch.unique_consecutive(segments, return_counts=True)[1].tolist()


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """A flat tensor of its own memory."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)


@dataclass(frozen=True)
class StoredRow:
    """A row of ENCODINGS beside its row of PROMPTS."""

    facts: Facts
    row: dict[str, Any]

    def check(self, prompt_id: str) -> None:
        """Refuse a row that could not be encoded, as one that can't be read.

        Raises:
            DataError: why, or that this is another prompt's row.
        """
        if self.row["prompt_id"] != prompt_id:
            raise DataError(f"prompt {prompt_id}: encodings of {self.row['prompt_id']} in its place")
        if self.row["status"] != "ok":
            raise DataError(f"prompt {prompt_id}: {self.row['error']}")

    def prompt(self, prompt: "Prompt") -> EncodedPrompt | None:
        """The tokens of one variant, to the bit as they were made; None for a prompt that is not here."""
        found = self._variants.get(prompt_key(self.facts.encoder_content, prompt))
        if found is None:
            return None
        blocks = [self.row["blocks"][n]["data"] for n in found["blocks"]]
        tokens = from_bytes(b"".join(blocks), self.facts.torch_dtype).view(-1, self.facts.dim)
        width = self.facts.dim * self.facts.torch_dtype.itemsize
        lengths = torch.tensor([len(block) // width for block in blocks], dtype=torch.long)
        roles, segments = (torch.tensor(found[name], dtype=torch.long) for name in ("roles", "segments"))
        return EncodedPrompt(tokens, roles.repeat_interleave(lengths), segments.repeat_interleave(lengths))

    @cached_property
    def _variants(self) -> dict[str, dict[str, Any]]:
        return {variant["key"]: variant for variant in self.row["variants"]}

    def latents(self, row: Mapping[str, Any], bucket: "Bucket") -> tuple[Tensor, float] | None:
        """`t c h w` float32 latents of the row's target and their frame rate; None when not here."""
        stored = self.row["latents"]
        if stored is None or self.facts.autoencoder_content is None:
            return None
        if stored["key"] != latents_key(self.facts.autoencoder_content, row, bucket):
            return None
        return from_bytes(stored["data"], torch.float32).view(*stored["shape"]), stored["fps"]
