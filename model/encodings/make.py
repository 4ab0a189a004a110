"""Encodes rows of prompts for `vimi-data encode`, and checks that encodings serve a training's config.

Each prompt in all variants that training can draw, through the frozen prompt encoder; each target, if the
generator works in latents, through the frozen autoencoder. A row that can't be encoded keeps its place, with
a status and a reason.

Encodings serve the trainings whose config agrees, field by field; models named by a path are compared by the
bytes of their files, since those may have changed or lie elsewhere on another machine.
"""

from dataclasses import asdict
from hashlib import sha256
from math import gcd
from pathlib import Path
from typing import Any

import torch

from infra.allocator import keep_freed_memory
from infra.config import canonical_json
from infra.errors import ConfigError, DataError
from infra.storage import sha256_file
from model.condition import EncodedPrompt
from model.data.batch import as_video, read_prompt
from model.data.buckets import Bucket, frames_in_clip, nearest_bucket
from model.data.inputs import InputConfig, dropped_sets, variants
from model.data.sample import read_pixels
from model.data.shards import Shards
from model.encodings.store import Encodings, Facts, latents_key, pack_prompts, to_bytes
from model.latents import open_latents
from model.prompt.encoder import prompt_key
from model.prompt.load import load_prompt_encoder
from model.prompt.pictures import chosen_pictures, picture_key, reference_pixels
from model.prompt.select import select
from model.space import PIXELS

ROWS_AT_ONCE = 16
"""Rows whose prompts are encoded together: bounds the memory of decoded pictures. Ours."""

Row = dict[str, Any]
Variants = dict[str, EncodedPrompt]


class RowEncoder:
    """Frozen encoder and autoencoder, loaded once a worker."""

    def __init__(self, config: InputConfig, device: str) -> None:
        self.config, self.buckets = config, config.shapes
        if device == "cpu":
            keep_freed_memory()
        self.encoder = load_prompt_encoder(config.encoder, device, remember=False)  # equal prompts meet below
        self.latents = open_latents(config.autoencoder, device)
        self.variants = variants(config.documents, config.dropout)

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of `Facts`, as JSON; the same in every worker of a job."""
        latents = self.latents
        return asdict(
            Facts(
                encoder=self.encoder.identity_hash,
                encoder_content=self.encoder.content_hash,
                dim=self.encoder.dim,
                dtype=str(self.encoder.dtype).removeprefix("torch."),
                autoencoder_content=latents.content_hash if latents else None,
                space=asdict(latents.space if latents else PIXELS),
            )
        )

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Rows of PROMPTS to as many rows of ENCODINGS, in their order."""
        return [
            made
            for first in range(0, len(rows), ROWS_AT_ONCE)
            for made in self._encode(rows[first:][:ROWS_AT_ONCE])
        ]

    def _encode(self, rows: list[Row]) -> list[Row]:
        encoded: list[Variants | DataError]
        try:
            encoded = [*self._encode_prompts(rows)]
        except DataError:  # one of them: find out which, and let the others live
            encoded = [self._encode_alone(row) for row in rows]
        return [self._row(row, found) for row, found in zip(rows, encoded, strict=True)]

    def _encode_alone(self, row: Row) -> Variants | DataError:
        try:
            return self._encode_prompts([row])[0]
        except DataError as error:
            return error

    def _encode_prompts(self, rows: list[Row]) -> list[Variants]:
        """Key -> tokens of every variant of every row; equal prompts are encoded once."""
        wanted = []
        for row in rows:
            whole = read_prompt(row)
            chosen = [select(whole, number, kinds) for number, kinds in self.variants]
            wanted.append({prompt_key(self.encoder.content_hash, prompt): prompt for prompt in chosen})
        prompts = {key: prompt for one in wanted for key, prompt in one.items()}
        tokens = dict(zip(prompts, self.encoder.encode_each(list(prompts.values())), strict=True))
        return [{key: tokens[key] for key in one} for one in wanted]

    def _row(self, row: Row, encoded: Variants | DataError) -> Row:
        nothing = {"prompt_id": row["prompt_id"], "blocks": [], "variants": [], "latents": None, "pictures": []}
        if isinstance(encoded, DataError):
            return {**nothing, "status": "bad_row", "error": str(encoded)}
        try:
            latents, pictures = self._encode_target(row), self._encode_pictures(row)
        except DataError as error:
            return {**nothing, "status": "undecodable", "error": str(error)}
        made = {**pack_prompts(encoded), "latents": latents, "pictures": pictures}
        return {**nothing, **made, "status": "ok", "error": None}

    def _encode_pictures(self, row: Row) -> list[Row]:
        """In latents, what the generator sees itself of any variant of the prompt; none in pixels."""
        latents, size = self.latents, self.config.reference_size
        if latents is None or self.config.references == "faithful":
            return []
        whole, found = read_prompt(row), {}
        for number, kinds in self.variants:
            for _, segment in chosen_pictures(select(whole, number, kinds)):
                key = picture_key(latents.content_hash, segment, size)
                if key not in found:
                    pixels = reference_pixels(segment, size).to(latents.device).float() / 127.5 - 1.0
                    found[key] = latents.encode(pixels[None, None])[0, 0]
        return [{"key": key, "data": to_bytes(one), "shape": list(one.shape)} for key, one in found.items()]

    def _encode_target(self, row: Row) -> Row | None:
        """The target in latents, at the size of its bucket; None in pixels or without a bucket."""
        bucket = self._bucket(row)
        if self.latents is None or bucket is None:
            return None
        frames, fps = read_pixels(row, bucket)
        pixels = as_video(frames).to(self.latents.device).to(torch.float32) / 127.5 - 1.0
        latents = self.latents.encode(pixels[None])[0]
        key = latents_key(self.latents.content_hash, row, bucket)
        return {"key": key, "data": to_bytes(latents), "shape": list(latents.shape), "fps": fps}

    def _bucket(self, row: Row) -> Bucket | None:
        frames = row["target"]["num_frames"] or frames_in_clip(row["start_s"], row["end_s"], row["fps"])
        number = nearest_bucket(
            row["media"], row["height_px"], row["width_px"], self.buckets, num_frames=frames
        )
        return None if number is None else self.buckets[number]


def make_row_encoder(config: dict[str, Any], device: str) -> RowEncoder:
    """From plain values, so that any process can make one."""
    return RowEncoder(InputConfig.model_validate(config), device)


def describe_inputs(config: InputConfig) -> dict[str, Any]:
    """What a certificate keeps of the config, as JSON: what later trainings are compared with."""
    described: dict[str, Any] = {
        "encoder": _by_content(config.encoder.identity()),
        "documents": sorted({*config.documents, 0}),
        "dropped": [sorted(kinds) for kinds in dropped_sets(config.dropout)],
    }
    if config.autoencoder is not None:
        described["autoencoder"] = _by_content(config.autoencoder)
        described["buckets"] = sorted(bucket.name for bucket in config.shapes)
        described["references"] = _described_references(config)
    return described


def _described_references(config: InputConfig) -> str:
    """What latents of pictures hang on, in words."""
    if config.references == "faithful":
        return "none"
    size, videos = config.reference_size_px, (config.width_px, config.height_px)
    return f"{size[0]}x{size[1]}, scenes {videos[0] // gcd(*videos)}:{videos[1] // gcd(*videos)}"


def check_encodings(config: InputConfig, encodings: Encodings, shards: Shards) -> None:
    """Refuse encodings that don't serve this config.

    Raises:
        ConfigError: one line that names every difference.
    """
    certificate = encodings.certificate
    if certificate.inputs.get("prompts") != shards.certificate.content_hash():
        raise ConfigError(
            f"{encodings.uri} encodes other shards than {shards.uri}",
            legal="the folder of prompts that it was made from, unchanged",
            cure=f"run `vimi-data encode` on {shards.uri}",
        )
    differences = _differences(certificate.facts["inputs"], describe_inputs(config))
    if differences:
        raise ConfigError(
            f"{encodings.uri} doesn't serve this training ({'; '.join(differences)})",
            cure="run `vimi-data encode --for` this config into another folder, or leave `encodings` out",
        )


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    theirs, ours = there["encoder"], here["encoder"]
    found = [
        f"encoder.{key}: {theirs.get(key)!r} there, {ours.get(key)!r} now"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key)
    ]
    if missing := sorted(set(here["documents"]) - set(there["documents"])):
        found.append(f"documents: {there['documents']} there, also {missing} now")
    if missing := [kinds for kinds in here["dropped"] if kinds not in there["dropped"]]:
        found.append(f"dropout: {_words(there['dropped'])} there, also {_words(missing)} now")
    for key in ("autoencoder", "buckets", "references"):
        if here.get(key) not in ("none", there.get(key)):
            found.append(f"{key}: {there.get(key, 'none')!r} there, {here.get(key, 'none')!r} now")
    return found


def _words(sets: list[list[str]]) -> str:
    return " | ".join("+".join(kinds) or "nothing" for kinds in sets)


def _by_content(value: Any) -> Any:
    """The same values with local paths replaced by the hash of what lies there."""
    if isinstance(value, dict):
        return {key: _by_content(item) for key, item in value.items()}
    if not isinstance(value, str) or not value:
        return value
    place = Path(value).expanduser()
    if place.is_file():
        return f"sha256:{sha256_file(str(place))[:16]}"
    if place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.is_file())
        listed = [[str(path.relative_to(place)), sha256_file(str(path))] for path in files]
        return f"sha256:{sha256(canonical_json(listed)).hexdigest()[:16]}"
    return value
