"""The LanceDB table of documents: open, read, upsert, tag. One folder, one table, one model.

memory/
lance/documents.lance   the table; every build leaves a tag that prompts can pin
certificate.json        model identity, tag, indexes and their measured recall, hashes of the table's files
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from infra.certificate import (
    Certificate,
    FileEntry,
    check_files,
    file_entries,
    read_sealed,
    require_certificate,
)
from infra.claim import JOB_FILE
from infra.clip import ClipConfig
from infra.errors import ConfigError, DataError, first_line
from infra.storage import absolute, exists, is_remote, join, list_files
from pipeline.schema import check_table, content_id, memory_schema

TABLE, LANCE_FOLDER = "documents", "lance"
IDS_PER_QUERY = 512  # ids in one `IN (...)`: long lists make the SQL parser slow
MADE_BY = "vimi-data build-index"
EMBEDDINGS = ("image_embedding", "text_embedding", "document_embedding")


@dataclass(frozen=True)
class Memory:
    """A committed version of the memory, opened for reading."""

    uri: str
    table: Any
    """lancedb.table.Table, checked out at `version`."""
    certificate: Certificate

    @property
    def version(self) -> str:
        """Tag of this version: a hash of its documents and of the model, so equal content, equal tag."""
        return str(self.certificate.facts["memory_version"])

    @property
    def model_hash(self) -> str:
        return str(self.certificate.facts["model_hash"])

    @property
    def dim(self) -> int:
        return int(self.certificate.facts["dim"])

    @property
    def num_documents(self) -> int:
        return int(self.table.count_rows())

    def columns_arrow(self, columns: Sequence[str]) -> pa.Table:
        """The named columns of all documents, in doc_id order whatever the history of the table."""
        return sorted_columns(self.table, columns)

    def vectors(self, column: str) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """Stream (doc_id, float16 [n d]) blocks of an embedding column, in table order."""
        yield from stream_vectors(self.table, column)

    def rows(self, doc_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """The named columns of these documents, in the order of `doc_ids`; unknown ids are left out."""
        names = list(dict.fromkeys(["doc_id", *columns]))
        unique = list(dict.fromkeys(doc_ids))
        parts = [
            self.table.search().where(id_filter(chunk)).select(names).limit(len(chunk)).to_arrow()
            for chunk in _chunks(unique, IDS_PER_QUERY)
        ]
        if not parts:
            return empty_table(self.table.schema, names)
        found = pa.concat_tables(parts).combine_chunks()
        place = {doc_id: index for index, doc_id in enumerate(found["doc_id"].to_pylist())}
        return found.take(pa.array([place[d] for d in doc_ids if d in place], pa.int64()))

    def images(self, doc_ids: Sequence[str]) -> dict[str, bytes]:
        """The JPEG of each of these documents."""
        table = self.rows(list(dict.fromkeys(doc_ids)), ["image"])
        return dict(zip(table["doc_id"].to_pylist(), table["image"].to_pylist(), strict=True))


def open_memory(uri: str, *, version: str | None = None) -> Memory:
    """Open a certified memory at its certified version, or at an older tag.

    Raises:
        ConfigError: no memory there, an unfinished one, a foreign table, an unknown tag.
        DataError: a file of the table is missing, damaged or changed (Lance's own files bear no checksums).
    """
    uri = absolute(uri)
    certificate = require_certificate(uri, job="build-index", made_by=MADE_BY)
    check_table_files(uri, certificate)
    tag = version or str(certificate.facts.get("memory_version"))
    table = open_table(uri)
    if table is None:
        raise ConfigError(f"{uri} holds a certificate but no table {TABLE!r}", cure=f"run `{MADE_BY}` again")
    try:
        tags = table.tags.list()
        if tag in tags:
            table.checkout(tag)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(uri, error) from None
    if tag not in tags:
        raise ConfigError(f"memory version {tag!r} is not in {uri}", legal=", ".join(sorted(tags)) or "none")
    _check_schema(table, int(certificate.facts["dim"]), uri)
    return Memory(uri=uri, table=table, certificate=certificate)


def check_table_files(uri: str, certificate: Certificate, *, but: str = "\0") -> None:
    """Read the table's files through once a process and compare them with the certificate of the memory.

    Args:
        uri: the memory's folder.
        certificate: of it.
        but: files with this in their path are not looked at.

    Raises:
        DataError: names the first file that is missing, damaged or changed, and the cure.
    """
    files = (entry for entry in certificate.files if entry.path.startswith(f"{LANCE_FOLDER}/"))
    check_files(uri, [entry for entry in files if but not in entry.path])


REWRITTEN = ("/_transactions/", "/latest_version_hint.json")
"""Files of Lance that no reader of a certified version depends on."""


def memory_files(uri: str, *others: str) -> list[FileEntry]:
    """The table's files as they lie there, for the certificate; and these others beside it.

    What Lance needs of all versions: data, deletions, indexes, manifests, tags; not what the next version
    rewrites, its log of transactions and its hint of the latest version.
    """
    base = absolute(uri)
    places = [p for p in list_files(join(base, LANCE_FOLDER)) if not any(part in p for part in REWRITTEN)]
    places += [place for place in others if exists(place)]
    return file_entries(base, places)


def require_model(memory: Memory, model_hash: str, *, name: str) -> None:
    """Refuse to mix the vectors of two models.

    Raises:
        ConfigError: the memory was embedded with another model than `name`.
    """
    if memory.model_hash != model_hash:
        there = memory.certificate.facts.get("model", {}).get("name", "another CLIP")
        raise ConfigError(
            f"memory {memory.uri} was embedded with {there} ({memory.model_hash}), "
            f"not with {name} ({model_hash})",
            cure="set clip to the memory's model, or build a memory with this one",
        )


def clip_configs(memory: Memory) -> dict[str, ClipConfig]:
    """Model hash -> config of each CLIP whose vectors the memory holds; the one that it was built with first.

    Raises:
        ConfigError: the memory doesn't say.
    """
    claim = join(memory.uri, JOB_FILE)
    if not exists(claim):
        raise ConfigError(f"{memory.uri} doesn't name its CLIP", cure="give the clip in the config")
    found = {memory.model_hash: read_sealed(claim)["config"]["clip"]}
    found |= {added: facts["config"] for added, facts in memory.certificate.facts.get("clips", {}).items()}
    return {model_hash: ClipConfig.model_validate(values) for model_hash, values in found.items()}


def connect(uri: str) -> Any:
    """The LanceDB database below a memory folder.

    Raises:
        ConfigError: the place can't be opened.
    """
    # Python's subprocess forks and executes at once, which is safe; LanceDB warns of every fork.
    warnings.filterwarnings("ignore", message="lancedb fork support", category=RuntimeWarning)
    import lancedb

    try:
        place = join(absolute(uri), LANCE_FOLDER)
        # Lance takes an object store's place for a URL: unquoted, two memories "a#1" and "a#2" would be one.
        place = quote(place, safe=":/") if is_remote(place) else place
        return lancedb.connect(place, storage_options=_storage_options(uri))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"can't open a LanceDB directory at {uri}: {first_line(error)}") from None


def open_table(uri: str) -> Any | None:
    """The table of documents at its latest version; None when the folder has none.

    Raises:
        ConfigError: something is there that LanceDB can't read.
    """
    database = connect(uri)
    try:
        if TABLE not in database.list_tables().tables:
            return None
        return database.open_table(TABLE)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(uri, error) from None


def _unreadable(uri: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"the LanceDB table at {uri} can't be read: {first_line(error)}",
        legal=f"a folder made by `{MADE_BY}`",
        cure="restore it, or delete the folder and build again",
    )


def upsert(table: Any, rows: pa.Table | pa.RecordBatchReader) -> int:
    """Insert the documents whose id the table lacks; one atomic commit. Returns how many were new.

    An id is a hash of the content, so a row that is there already is the same row and stays. The id is
    declared as the table's primary key (pipeline/schema.py): without that, concurrent writers
    duplicate keys silently (measured). Columns that the rows lack (another CLIP's) stay empty.
    """
    try:
        result = table.merge_insert("doc_id").when_not_matched_insert_all().execute(rows)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"can't write documents: {first_line(error)}; the table stays at its last version"
        ) from error
    return int(result.num_inserted_rows)


def version_tag(table: Any, model_hash: str) -> str:
    """The tag of the table's content: hash of the sorted document ids and of the model."""
    ids = sorted_columns(table, ["doc_id"])["doc_id"].to_pylist()
    return "memory-" + content_id("memory", model_hash, *ids)[:12]


def tag_table(table: Any, tag: str) -> None:
    """Tag the version that is there now: these documents with their indexes."""
    if tag in table.tags.list():
        table.tags.update(tag, table.version)
    else:
        table.tags.create(tag, table.version)


def model_column(column: str, model_hash: str | None = None) -> str:
    """Name of an embedding column: the first model's have plain names, others carry their hash."""
    return column if model_hash is None else f"{column}_{model_hash[:8]}"


def sorted_columns(table: Any, columns: Sequence[str]) -> pa.Table:
    names = list(dict.fromkeys(["doc_id", *columns]))
    found = table.search().select(names).to_arrow()
    return found.sort_by("doc_id").select(list(columns))


def stream_vectors(table: Any, column: str, *, batch_rows: int = 8192) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Yield (doc_id, float16 [n d]) of rows that have a vector; memory is bounded by the batch."""
    reader = table.search().select(["doc_id", column]).to_batches(batch_size=batch_rows)
    for batch in reader:
        ids, vectors = batch["doc_id"], batch[column]
        if vectors.null_count:
            keep = vectors.is_valid()
            ids, vectors = ids.filter(keep), vectors.filter(keep)
        yield ids, vectors_numpy(vectors)


def vectors_numpy(array: pa.Array) -> np.ndarray:
    """A FixedSizeList<float16> array without nulls as float16 [n d], without a copy."""
    return np.asarray(array.flatten()).reshape(len(array), array.type.list_size)


def vectors_arrow(vectors: np.ndarray) -> pa.Array:
    """Float [n d] as FixedSizeList<float16>."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def empty_table(schema: pa.Schema, names: Sequence[str]) -> pa.Table:
    return pa.schema([schema.field(name) for name in names]).empty_table()


def _check_schema(table: Any, dim: int, uri: str) -> None:
    try:
        check_table(table.schema, memory_schema(dim), f"memory {uri}")
    except ValueError as error:
        raise ConfigError(str(error), cure=f"build it again with `{MADE_BY}`") from None


def id_filter(doc_ids: Sequence[str]) -> str:
    quoted = ", ".join("'" + doc_id.replace("'", "''") + "'" for doc_id in doc_ids)
    return f"doc_id IN ({quoted})"


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _storage_options(uri: str) -> dict[str, str] | None:
    """Options for object stores that plain environment variables don't reach (endpoints over HTTP)."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not str(uri).startswith("s3://") or not endpoint:
        return None
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
