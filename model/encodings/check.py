"""Which encodings serve which training: compared field by field, models by the bytes of their files.

A model named by a path may have been changed since, or lie elsewhere on another machine; so local files are
compared by content. Names of a hub are compared as names.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

from infra.config import canonical_json
from infra.errors import ConfigError
from infra.storage import sha256_file
from model.data.inputs import InputConfig, dropped_sets, most_documents
from model.data.shards import Shards
from model.encodings.store import Encodings

NO_MATTER = {"cache", "batch_size"}
"""Fields of the encoder that change how fast it is, not what it gives."""


def describe_inputs(config: InputConfig) -> dict[str, Any]:
    """What a certificate keeps of the config, as JSON: what later trainings are compared with."""
    described: dict[str, Any] = {
        "encoder": _by_content(config.encoder.model_dump(mode="json", exclude=NO_MATTER)),
        "documents": sorted({*config.documents, 0, most_documents(config)}),
        "dropped": [sorted(kinds) for kinds in dropped_sets(config.dropout)],
    }
    if config.autoencoder.kind != "none":
        described["autoencoder"] = _by_content(config.autoencoder.model_dump(mode="json"))
        described["buckets"] = sorted(bucket.name for bucket in config.shapes)
    return described


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
    for key in ("autoencoder", "buckets"):
        if there.get(key) != here.get(key):
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
