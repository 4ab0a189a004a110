"""The memory's folder: open a version, read its rows.

memory/
lance/documents.lance   the table: one fragment a shard; every build leaves a tag that prompts can pin
shards/NAME/            the guard's columns, BM25's postings, and a certificate of all of the shard's files
words-TAG.arrow         BM25's statistics of all shards of a version
sample-TAG.arrow        the documents of the smallest ids: what the guard's bound and the recall are measured on
certificate.json        model identity, versions, shards, recall of the index, hashes
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from infra.certificate import Certificate, check_files, read_certificate, read_sealed, require_certificate
from infra.claim import JOB_FILE
from infra.clip import ClipConfig
from infra.errors import ConfigError, DataError, first_line
from infra.storage import absolute, is_remote, join, read_bytes, size_bytes
from pipeline.memory.retrieve.analysis import Analysis
from pipeline.memory.retrieve.bm25 import Statistics
from pipeline.schema import check_table, content_id, memory_schema

TABLE, LANCE_FOLDER, SHARDS, INDICES = "documents", "lance", "shards", "_indices"
IDS_PER_QUERY = 512  # ids in one `IN (...)`: long lists make the SQL parser slow
MADE_BY = "vimi-data build-index"
EMBEDDINGS = ("image_embedding", "text_embedding", "document_embedding")
SHARD_JOB = "shard"


@dataclass(frozen=True)
class Shard:
    """Where a shard's documents are."""

    name: str
    first: int
    """Number of its first document: documents are numbered through all shards, in their order."""
    rows: int
    fragment: int
    """Of the table."""
    version: str
    """Tag of the first version that has it."""


@dataclass(frozen=True)
class Memory:
    """A committed version of the memory, opened for reading."""

    uri: str
    table: Any
    """lancedb.table.Table, checked out at `version`."""
    certificate: Certificate
    version: str
    """Tag of this version: a hash of its documents, of the model and of the words' analysis, so equal content,
    equal tag."""
    shards: tuple[Shard, ...]

    @property
    def model_hash(self) -> str:
        return str(self.certificate.facts["model_hash"])

    @property
    def dim(self) -> int:
        return int(self.certificate.facts["dim"])

    @property
    def analysis(self) -> Analysis:
        return self.certificate.facts["analysis"]

    @property
    def num_documents(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @cached_property
    def dataset(self) -> Any:
        """The table as `lance.LanceDataset`: its fragments one by one, its rows by number."""
        return lance_dataset(self.uri, self.version)

    @cached_property
    def statistics(self) -> Statistics:
        """BM25's, of all shards."""
        return read_statistics(self.uri, self.version)

    @cached_property
    def sample(self) -> pa.Table:
        """doc_id, source_uri, source_sha256 and vectors of the documents with the smallest ids: as good as
        drawn by lot, and the same however the memory was built.
        """
        return read_table(join(self.uri, sample_name(self.version)))

    def take(self, numbers: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """The named columns of the documents with these numbers, in their order."""
        if not len(numbers):
            return pa.schema([self.table.schema.field(name) for name in columns]).empty_table()
        return self.dataset.take(list(map(int, numbers)), columns=list(columns))

    def rows(self, doc_ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """The named columns of these documents, in the order of `doc_ids`; unknown ids are left out."""
        names, unique = list(dict.fromkeys(["doc_id", *columns])), list(dict.fromkeys(doc_ids))
        chunks = [unique[at : at + IDS_PER_QUERY] for at in range(0, len(unique), IDS_PER_QUERY)]
        empty = pa.schema([self.table.schema.field(name) for name in names]).empty_table()
        search = lambda some: self.table.search().where(id_filter(some)).select(names).limit(len(some))  # noqa: E731
        found = pa.concat_tables([empty, *(search(some).to_arrow().select(names) for some in chunks)])
        place = {doc_id: index for index, doc_id in enumerate(found["doc_id"].to_pylist())}
        return found.combine_chunks().take(pa.array([place[d] for d in doc_ids if d in place], pa.int64()))


def table_tag(facts: dict[str, Any]) -> str:
    """Lance's tag of the certified table: the version's own, or that of the indexes it got later."""
    return str(facts.get("table_tag", facts["memory_version"]))


def uncertified(uri: str, facts: dict[str, Any]) -> Memory:
    """A version that is tagged and has no certificate yet: what a build's own workers read.

    Args:
        uri: its folder.
        facts: of the certificate that it gets.
    """
    certificate = Certificate(job="", config_hash="", num_in=0, num_out=0, facts=facts)
    shards = tuple(Shard(**shard) for shard in facts["shards"])
    return Memory(uri, open_table(uri), certificate, facts["memory_version"], shards)


def open_memory(uri: str, *, version: str | None = None, read_through: bool = True) -> Memory:
    """Open a certified memory at its certified version, or at an older tag.

    Args:
        uri: its folder.
        version: an older tag; None = the newest.
        read_through: compare every file of every shard and of the search index with its hash, once a process.
            False = only that each shard is there, for workers whose job has had them read by `check_shard` and
            `check_index`: a large memory's index is more than a worker reads of it.

    Raises:
        ConfigError: no memory there, an unfinished one, a foreign table, an unknown tag, an older layout.
        DataError: a file is missing, damaged or changed (Lance's own files bear no checksums).
    """
    uri = absolute(uri)
    certificate = require_certificate(uri, job="build-index", made_by=MADE_BY)
    if "shards" not in certificate.facts:
        cure = "build it again, in another folder"
        raise ConfigError(f"{uri} is a memory of an older layout, without shards", cure=cure)
    check_files(uri, [f for f in certificate.files if read_through or f"/{INDICES}/" not in f.path])
    tags = certificate.facts["versions"]
    tag = version or str(certificate.facts["memory_version"])
    if tag not in tags:
        raise ConfigError(f"memory version {tag!r} is not in {uri}", legal=", ".join(sorted(tags)) or "none")
    there = set(tags[: tags.index(tag) + 1])
    shards = tuple(Shard(**s) for s in certificate.facts["shards"] if s["version"] in there)
    for shard in shards:
        check_shard(uri, shard.name, read_through=read_through)
    table = open_table(uri)
    if table is None:
        raise ConfigError(f"{uri} holds a certificate but no table {TABLE!r}", cure=f"run `{MADE_BY}` again")
    try:
        table.checkout(table_tag(certificate.facts) if tag == certificate.facts["memory_version"] else tag)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(uri, error) from None
    try:
        check_table(table.schema, memory_schema(int(certificate.facts["dim"])), f"memory {uri}")
    except ValueError as error:
        raise ConfigError(str(error), cure=f"build it again with `{MADE_BY}`") from None
    return Memory(uri, table, certificate, tag, shards)


def check_index(memory: Memory) -> None:
    """Read through what belongs to no shard: the search index, the table's manifests, the words' statistics.

    Raises:
        DataError: names the first file that is missing or damaged, and the cure.
    """
    check_files(memory.uri, memory.certificate.files)


def check_shard(uri: str, name: str, *, read_through: bool = True, parts: Sequence[str] = ()) -> None:
    """Refuse a shard of which a file is missing or, if it is read through, damaged.

    `parts` are the names of the only arrays that are read through; none = all of its files.

    Raises:
        DataError: names the first such file, and the cure.
    """
    certificate = read_certificate(join(uri, SHARDS, name), job=SHARD_JOB)
    cure = f"restore it, or delete {uri} and build it again"
    if certificate is None:
        raise DataError(f"shard {name} of {uri} is missing; cure: {cure}")
    if read_through:
        places = [join(SHARDS, name, f"{part}.arrow") for part in parts]
        check_files(uri, [file for file in certificate.files if not parts or file.path in places])
        return
    for entry in certificate.files:
        if size_bytes(join(uri, entry.path)) != entry.num_bytes:
            raise DataError(f"{entry.path} of {uri} is missing or cut short; cure: {cure}")


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


def clip_config(memory: Memory) -> ClipConfig:
    """The CLIP that the memory was built with.

    Raises:
        ConfigError: the memory doesn't say.
    """
    try:
        return ClipConfig.model_validate(read_sealed(join(memory.uri, JOB_FILE))["config"]["clip"])
    except FileNotFoundError:
        raise ConfigError(f"{memory.uri} doesn't name its CLIP", cure="give the clip in the config") from None


def connect(uri: str) -> Any:
    """The LanceDB database below a memory folder.

    Raises:
        ConfigError: the place can't be opened.
    """
    # Python's subprocess forks and executes at once, which is safe; LanceDB warns of every fork.
    warnings.filterwarnings("ignore", message="lancedb fork support", category=RuntimeWarning)
    import lancedb

    try:
        return lancedb.connect(_lance_place(uri), storage_options=storage_options(uri))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"can't open a LanceDB directory at {uri}: {first_line(error)}") from None


def _lance_place(uri: str, *parts: str) -> str:
    place = join(absolute(uri), LANCE_FOLDER, *parts)
    # Lance takes an object store's place for a URL: unquoted, two memories "a#1" and "a#2" would be one.
    return quote(place, safe=":/") if is_remote(place) else place


def lance_table(uri: str) -> str:
    """Place of the table, as Lance takes it."""
    return _lance_place(uri, f"{TABLE}.lance")


def lance_dataset(uri: str, version: str | int | None = None) -> Any:
    """The table as `lance.LanceDataset`."""
    warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)
    import lance

    return lance.dataset(lance_table(uri), version=version, storage_options=storage_options(uri))


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


def version_tag(model_hash: str, analysis: Analysis, key_frames: int, rows: int, ids_sum: int) -> str:
    """The tag of a memory's content.

    Args:
        model_hash: of the CLIP.
        analysis: of the words.
        key_frames: of a video, from which its vector and picture are.
        rows: documents.
        ids_sum: sum of all their ids as numbers: the same in any order, and added to when a memory grows.
    """
    known = content_id("memory", model_hash, analysis, key_frames, rows, f"{ids_sum % 2**96:x}")
    return f"memory-{known[:12]}"


def words_name(tag: str) -> str:
    return f"words-{tag}.arrow"


def sample_name(tag: str) -> str:
    return f"sample-{tag}.arrow"


def read_statistics(uri: str, tag: str) -> Statistics:
    """BM25's statistics of a version."""
    table = read_table(join(uri, words_name(tag)))
    counts = {name.decode(): int(value) for name, value in (table.schema.metadata or {}).items()}
    return Statistics(column(table, "hash"), column(table, "count"), **counts)


def read_table(place: str) -> pa.Table:
    """An Arrow file: a local one is memory-mapped, another read whole. One record batch, so columns are
    arrays.
    """
    source = pa.BufferReader(read_bytes(place)) if is_remote(place) else pa.memory_map(place)
    return pa.ipc.open_file(source).read_all()


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers without nulls; of a table that `read_table` mapped, without a copy."""
    return table[name].combine_chunks().to_numpy(zero_copy_only=False)


def arrow_bytes(table: pa.Table) -> bytes:
    """As an Arrow file of one record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def id_filter(doc_ids: Sequence[str]) -> str:
    quoted = ", ".join("'" + doc_id.replace("'", "''") + "'" for doc_id in doc_ids)
    return f"doc_id IN ({quoted})"


def storage_options(uri: str) -> dict[str, str] | None:
    """Options for object stores that plain environment variables don't reach (endpoints over HTTP)."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not str(uri).startswith("s3://") or not endpoint:
        return None
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
