"""A shard of the memory: written once by a worker, opened by memory map, asked for its best documents.

lance/…                  the documents themselves, one fragment a shard
shards/NAME/documents.arrow   a row a document: its key and what the guard judges by
shards/NAME/words.arrow       BM25's words, and how many documents have each
shards/NAME/postings.arrow    which documents these are, word by word
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, partial

import numpy as np
import pyarrow as pa

from infra.storage import join, write_bytes
from pipeline.memory.retrieve import bm25, clip
from pipeline.memory.retrieve.bm25 import Postings
from pipeline.memory.retrieve.hits import Hits, flatten, merge
from pipeline.memory.retrieve.retriever import Retriever
from pipeline.memory.store import SHARDS, Memory, arrow_bytes, column, read_table
from pipeline.memory.vectors import vectors_numpy
from pipeline.schema import clip_id, content_id

GUARD = ("doc_id", "source_uri", "source_sha256", "start_s", "end_s", "split", "phash")
"""Columns of the table that `documents.arrow` has too."""
LIGHT = (*GUARD, "text", "width_px", "height_px")
"""Columns of the table that `documents.arrow` is made of."""
KEPT_BYTES = 128 << 20
"""Vectors of a shard up to this size stay in memory once they are read, which takes three times as much; larger
ones are streamed each time. Ours."""

READ_AHEAD_BYTES = 64 << 20
"""Vectors that are read before they are asked for; Lance's own 2 GB hold a whole shard. Ours."""


def key_of(doc_id: str) -> int:
    """The first 64 bits of an id: orders documents."""
    return int(doc_id[:16], 16)


def same_key(row: dict) -> int:
    """What two exact duplicates share: the piece of the parent, and the words (case and spaces aside); 0 = no
    parent is known.
    """
    if not row["source_sha256"]:
        return 0
    words = " ".join((row["text"] or "").lower().split())
    return int(content_id("same", row["source_sha256"], row["start_s"], row["end_s"], words)[:15], 16)


def documents_table(rows: pa.Table) -> pa.Table:
    """`documents.arrow` of rows of the table: the guard's columns, and

    clip_id   of the clip that the document was made from
    key       orders documents (`key_of`)
    same      what exact duplicates share (`same_key`)
    area      of the source, in pixels
    """
    every = rows.to_pylist()
    area = [(r["width_px"] or 0) * (r["height_px"] or 0) for r in every]
    return (
        rows.select(GUARD)
        .append_column("clip_id", clip_ids(rows))
        .append_column("key", pa.array([key_of(r["doc_id"]) for r in every], pa.uint64()))
        .append_column("same", pa.array([same_key(r) for r in every], pa.uint64()))
        .append_column("area", pa.array(area, pa.int64()))
    )


def clip_ids(rows: pa.Table) -> pa.Array:
    """The id of the clip that each document was made from."""
    every = rows.select(["source_sha256", "source_uri", "start_s", "end_s", "text"]).to_pylist()
    ids = [
        clip_id(r["source_sha256"] or r["source_uri"], r["start_s"] or 0.0, r["end_s"] or 0.0, r["text"])
        for r in every
    ]
    return pa.array(ids, pa.string())


def write_arrays(uri: str, name: str, documents: list[pa.Table], postings: Postings) -> list[str]:
    """Write the arrays of a shard.

    Args:
        uri: the memory.
        name: of the shard.
        documents: pieces from `documents_table`.
        postings: of the same documents.

    Returns:
        The files' places.
    """
    tables = {
        "documents": pa.concat_tables(documents),
        "words": pa.table({"hash": postings.hashes, "count": np.diff(postings.starts)}),
        "postings": pa.table({"doc": postings.docs, "tf": postings.tf}),
        "lengths": pa.table({"length": postings.lengths}),
    }
    places = {name_: join(uri, SHARDS, name, f"{name_}.arrow") for name_ in tables}
    for name_, table in tables.items():
        write_bytes(places[name_], arrow_bytes(table))
    return list(places.values())


def read_words(uri: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A shard's (word hashes, documents that have each, words of each document)."""
    read = lambda file: read_table(join(uri, SHARDS, name, f"{file}.arrow"))  # noqa: E731
    words = read("words")
    return column(words, "hash"), column(words, "count"), column(read("lengths"), "length")


class Tile:
    """An open shard.

    Args:
        memory: of the shard.
        against: which vectors queries are compared with: document, image or text.
        number: place of the shard in the memory.
    """

    def __init__(self, memory: Memory, against: str, number: int) -> None:
        self.memory, self.shard, self.column = memory, memory.shards[number], f"{against}_embedding"
        self.documents = self._read("documents")
        self.keys = column(self.documents, "key")
        self.first = self.shard.first
        self.kept: list[clip.Block] | None = None
        self.allowed: np.ndarray | None = None
        """bool `n`: the documents that may be found; None = all."""

    def __len__(self) -> int:
        return self.shard.rows

    def _read(self, name: str) -> pa.Table:
        return read_table(join(self.memory.uri, SHARDS, self.shard.name, f"{name}.arrow"))

    @cached_property
    def words(self) -> bm25.Index:
        hashes, counts, lengths = read_words(self.memory.uri, self.shard.name)
        starts, postings = np.concatenate([[0], np.cumsum(counts)]), self._read("postings")
        found = Postings(hashes, starts, column(postings, "doc"), column(postings, "tf"), lengths)
        return bm25.Index(found, self.keys, self.memory.statistics, self.memory.analysis)

    def by_words(self, texts: Sequence[str], depth: int) -> list[Hits]:
        """The `depth` best documents by BM25 of each text."""
        return self.words.search(texts, depth, self.allowed)

    def by_vectors(self, vectors: np.ndarray, depth: int) -> list[Hits]:
        """The `depth` nearest documents of each vector (float32 `q d`)."""
        return clip.nearest(self.blocks(), vectors, self.keys, depth)

    def take(self, docs: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Columns of the table for these rows of the shard."""
        return self.memory.take((docs + self.first).tolist(), columns)

    def blocks(self) -> Iterable[clip.Block]:
        """The shard's vectors; small shards keep them."""
        if self.kept is None:
            blocks = map(clip.Block.make, self._vectors())
            if 2 * self.memory.dim * len(self) > KEPT_BYTES:
                return blocks
            self.kept = list(blocks)
        return self.kept

    def _vectors(self) -> Iterator[np.ndarray]:
        fragment = self.memory.dataset.get_fragment(self.shard.fragment)
        scanner = fragment.scanner(
            columns=[self.column],
            batch_size=clip.BLOCK_ROWS,
            batch_readahead=1,
            io_buffer_size=READ_AHEAD_BYTES,
        )
        for batch in scanner.to_batches():
            yield vectors_numpy(batch[self.column])


class Tiles:
    """The shards of a memory, opened one after the other.

    Args:
        memory: an open memory.
        against: which vectors queries are compared with.
        kept: shards that stay open.
    """

    def __init__(self, memory: Memory, against: str, *, kept: int = 1) -> None:
        self.memory = memory
        self.open = lru_cache(kept)(partial(Tile, memory, against))

    def __iter__(self) -> Iterator[Tile]:
        return (self.open(number) for number in range(len(self.memory.shards)))


def ask(tile: Tile, method: Retriever, texts: Sequence[str], vectors: np.ndarray, depth: int) -> np.ndarray:
    """`HIT [n]`: what a shard answers to these queries."""
    return flatten(method.search(tile, texts, vectors, depth), tile.first)


def ask_all(
    tiles: Iterable[Tile], method: Retriever, texts: Sequence[str], vectors: np.ndarray, depth: int
) -> np.ndarray:
    """`HIT [n]`: what the whole memory answers, exactly, ordered by query, kind and rank."""
    return merge((ask(tile, method, texts, vectors, depth) for tile in tiles), depth)
