"""Planted documents for the tests of the memory: real tables, invented vectors."""

import numpy as np
import pyarrow as pa

from infra.certificate import Certificate, write_certificate
from pipeline.memory.commit import create_table
from pipeline.memory.store import memory_files, upsert, vectors_arrow, version_tag
from pipeline.memory.vectors import unit
from pipeline.schema import doc_id, memory_schema

MODEL_HASH = "planted"


def planted(count: int, *, start: int = 0, dim: int = 16, seed: int = 0, clusters: int = 20) -> np.ndarray:
    """Clustered unit vectors number `start` to `start + count`, float32 `count dim`."""
    centres = np.random.default_rng(seed).normal(size=(clusters, dim))
    noise = [np.random.default_rng([seed, n]).normal(size=dim) for n in range(start, start + count)]
    return unit(centres[np.arange(start, start + count) % clusters] + 0.7 * np.stack(noise))


def documents(
    count: int, *, dim: int = 16, start: int = 0, seed: int = 0, texts: list[str] | None = None
) -> pa.Table:
    """Documents number `start` to `start + count`: the same numbers are the same documents."""
    schema = memory_schema(dim)
    numbers = range(start, start + count)
    words = ["red", "green", "blue", "white", "black"]
    texts = texts or [f"a {words[n % 5]} ball number {n}" for n in numbers]
    vectors = vectors_arrow(planted(count, start=start, dim=dim, seed=seed))
    values = {
        "doc_id": [doc_id(f"source-{n}", 0.0, 0.0, text) for n, text in zip(numbers, texts, strict=True)],
        "text": texts,
        "image": [f"jpeg {n}".encode() for n in numbers],
        "media": ["image"] * count,
        "source_uri": [f"/corpus/{n}.png" for n in numbers],
        "source_sha256": [f"source-{n}" for n in numbers],
        "start_s": [0.0] * count,
        "end_s": [0.0] * count,
        "width_px": [64 + n % 3 for n in numbers],
        "height_px": [48] * count,
        "phash": list(numbers),
        "source_name": [("photos", "films")[n % 2] for n in numbers],
        "licence": [("cc-by", None)[n % 2] for n in numbers],
        "split": ["train"] * count,
    }
    arrays = [
        vectors if field.name.endswith("_embedding") else pa.array(values[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def make_memory(uri: str, rows: pa.Table, *, dim: int = 16, indexes: dict | None = None) -> None:
    """A certified memory of these documents, as build-index leaves one."""
    table = create_table(uri, dim)
    upsert(table, rows)
    tag = version_tag(table, MODEL_HASH)
    table.tags.create(tag, table.version)
    facts = {
        "memory_version": tag,
        "versions": [tag],
        "model_hash": MODEL_HASH,
        "model": {"name": "planted"},
        "dim": dim,
        "indexes": indexes or {},
    }
    write_certificate(
        uri,
        Certificate(
            job="build-index",
            config_hash="0",
            num_in=len(rows),
            num_out=len(rows),
            facts=facts,
            files=memory_files(uri),
        ),
    )
