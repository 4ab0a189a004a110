"""A certified folder of encodings, and the prompt encoder that reads them instead of computing.

One file for each row group of the prompts, and in it one row group for each row: a trainer that has the row
finds its encodings without an index, and reads no others. `part-00003.parquet`, row group 2, row 5 ->
`part-00003-0002.parquet`, row group 5.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow.parquet as pq
import torch

from infra.errors import ConfigError, DataError, TrainingError
from infra.storage import Certificate, absolute, join, read_certificate
from model.condition import Prompt
from model.data.shards import RowGroup
from model.encodings.stored import Facts, StoredRow
from model.prompt.config import PromptEncoderConfig
from model.prompt.encoder import EncodedPrompt, PromptEncoder
from model.prompt.load import load_prompt_encoder
from model.prompt.select import drop_empty

JOB = "encode"
MADE_BY = "vimi-data encode"

log = logging.getLogger(__name__)


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
