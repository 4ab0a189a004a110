"""Stored encodings: reads tokens and latents that `vimi-data encode` made, instead of computing them.

Every variant of a prompt is named by the hash of the encoder and of the prompt's own text and pictures, a
latent by the autoencoder, the target's bytes and the bucket: what is found belongs to what was asked for, or
nothing is found. Variants share most of their tokens (a CLIP's all of them), so tokens are kept as blocks,
one a segment, each once a row.

One file for each row group of the prompts, and in it one row group for each row: a trainer that has the row
finds its encodings without an index, and reads no others. `part-00003.parquet`, row group 2, row 5 ->
`part-00003-0002.parquet`, row group 5.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from infra.certificate import Certificate, read_certificate
from infra.config import canonical_json
from infra.errors import ConfigError, DataError, TrainingError
from infra.storage import absolute, join
from model.condition import EncodedPrompt, Prompt, Segment
from model.data.batch import TargetKind
from model.data.buckets import Bucket
from model.data.shards import RowGroup
from model.prompt.encoder import PromptEncoder, PromptEncoderConfig, prompt_key
from model.prompt.load import load_prompt_encoder
from model.prompt.pictures import ReferenceSize, picture_key
from model.prompt.select import drop_empty

JOB = "encode"
MADE_BY = "vimi-data encode"

log = logging.getLogger(__name__)


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


def latents_key(autoencoder_content: str, row: Mapping[str, Any], bucket: Bucket) -> str:
    """Hex sha256 of all that a row's latents depend on.

    A reference's bytes lie elsewhere: it is named by its parent's hash, or its path where that is unknown.
    """
    target = row["target"]
    parent = row["source_sha256"] or row["source_uri"]
    place = [parent, row["start_s"], row["end_s"]] if target["kind"] == TargetKind.REFERENCE else []
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

    def prompt(self, prompt: Prompt) -> EncodedPrompt | None:
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

    def reference(self, segment: Segment, size: ReferenceSize) -> Tensor:
        """`c h w` float32 latents of a picture that the generator sees itself.

        Raises:
            DataError: they are not here.
        """
        key = picture_key(self.facts.autoencoder_content or "", segment, size)
        found = next((stored for stored in self.row["pictures"] if stored["key"] == key), None)
        if found is None:
            raise DataError(f"prompt {self.row['prompt_id']}: no latents of its {segment.role} picture")
        return from_bytes(found["data"], torch.float32).view(*found["shape"])

    def latents(self, row: Mapping[str, Any], bucket: Bucket) -> tuple[Tensor, float] | None:
        """`t c h w` float32 latents of the row's target and their frame rate; None when not here."""
        stored = self.row["latents"]
        if stored is None or self.facts.autoencoder_content is None:
            return None
        if stored["key"] != latents_key(self.facts.autoencoder_content, row, bucket):
            return None
        return from_bytes(stored["data"], torch.float32).view(*stored["shape"]), stored["fps"]


@dataclass(frozen=True)
class Encodings:
    """Encodings of one folder of prompts."""

    uri: str
    certificate: Certificate

    @cached_property
    def facts(self) -> Facts:
        return Facts(**self.certificate.facts["encodings"])

    def place(self, group: RowGroup) -> str:
        """The file that holds the encodings of a row group of the prompts."""
        stem = group.uri.rpartition("/")[2].removesuffix(".parquet")
        return join(self.uri, f"{stem}-{group.index:04d}.parquet")

    def read_row(self, file: pq.ParquetFile, number: int) -> StoredRow:
        """Row `number` of the row group whose file this is.

        Raises:
            DataError: there is no such row.
        """
        if number >= file.metadata.num_row_groups:
            raise DataError(f"{self.uri} holds no encodings of row {number} of a row group")
        return StoredRow(self.facts, file.read_row_group(number).to_pylist()[0])


def open_encodings(uri: str | None) -> Encodings | None:
    """Open a folder that `vimi-data encode` made; None for None.

    Raises:
        ConfigError: not certified, or of another job.
    """
    if uri is None:
        return None
    try:
        certificate = read_certificate(uri, job=JOB)
    except DataError as error:
        raise ConfigError(str(error), cure=f"give the output of `{MADE_BY}`") from None
    if certificate is None:
        raise ConfigError(f"no certified encodings at {uri}", cure=f"run `{MADE_BY}` first, or to its end")
    return Encodings(absolute(uri), certificate)


class StoredEncoder(PromptEncoder):
    """The encoder that made the encodings, by its facts alone: it is loaded when a prompt is not among them."""

    def __init__(
        self, config: PromptEncoderConfig, encodings: Encodings, device: str | torch.device = "cpu"
    ) -> None:
        self.config, self.encodings, self.device = config, encodings, device
        self.dim = encodings.facts.dim
        self.dtype = encodings.facts.torch_dtype
        self.identity_hash = encodings.facts.encoder
        self.content_hash = encodings.facts.encoder_content
        self.row: StoredRow | None = None
        """A row whose prompts will be asked for: its variants are served (by content, as everywhere)."""

    @property
    def identity(self) -> dict[str, Any]:
        return {"hash": self.encodings.facts.encoder}

    @property
    def arithmetic(self) -> dict[str, Any]:
        return {"content_hash": self.encodings.facts.encoder_content}

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The encoder itself, loaded now.

        Raises:
            TrainingError: it is not the one that made the encodings.
        """
        log.info("a prompt is not among the encodings: the prompt encoder is loaded")
        encoder = load_prompt_encoder(self.config, self.device)
        if encoder.identity_hash != self.identity_hash:
            raise TrainingError(
                f"{self.encodings.uri} was made by another prompt encoder ({self.identity_hash[:12]} there, "
                f"{encoder.identity_hash[:12]} now)"
            )
        return encoder

    def encode_each(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Encode what is not stored."""
        known = [self._known(prompt) for prompt in prompts]
        missing = [prompt for prompt, there in zip(prompts, known, strict=True) if there is None]
        made = iter(self.encoder.encode_each(missing) if missing else ())
        return [next(made) if there is None else there for there in known]

    def _known(self, prompt: Prompt) -> EncodedPrompt | None:
        """Of `row`; and a prompt that says nothing has no tokens, and needs no encoder."""
        if not drop_empty(prompt):
            return self._nothing()
        return self.row.prompt(prompt) if self.row is not None else None

    def _nothing(self) -> EncodedPrompt:
        none = torch.zeros(0, dtype=torch.long)
        return EncodedPrompt(torch.zeros(0, self.dim, dtype=self.dtype), none, none)


def open_encoder(
    config: PromptEncoderConfig, encodings: Encodings | None, device: str | torch.device = "cpu"
) -> PromptEncoder:
    """The prompt encoder of a run: loaded, or by what is stored of it."""
    if encodings is None:
        return load_prompt_encoder(config, device)
    return StoredEncoder(config, encodings, device)
