"""Planted documents for the tests of the memory: real tables, invented vectors."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from infra.certificate import Certificate, write_certificate
from infra.storage import delete, join, write_bytes
from pipeline.journal import Receipt, Unit
from pipeline.memory.build_index.index import IndexConfig, build_indexes
from pipeline.memory.build_index.publish import own_files, publish, smallest, tag_latest
from pipeline.memory.build_index.shards import DROPPED, STAGED, ShardWriter, commit, create_table, deal
from pipeline.memory.embed.pictures import KEY_FRAMES
from pipeline.memory.retrieve.analysis import Analysis
from pipeline.memory.store import arrow_bytes, version_tag
from pipeline.memory.vectors import unit, vectors_arrow
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


def stage(build: str, rows: pa.Table, unit_rows: int) -> list[dict[str, Any]]:
    """Write staged files of `unit_rows` documents, as the embedding workers leave them; their receipts."""
    receipts = []
    for start in range(0, len(rows), unit_rows):
        data = arrow_bytes(part := rows.slice(start, unit_rows))
        digest = hashlib.sha256(data).hexdigest()
        write_bytes(join(build, STAGED, f"{digest[:32]}.arrow"), data)
        receipts.append({"file": f"{digest[:32]}.arrow", "sha256": digest, "documents": len(part)})
    return receipts


def make_memory(
    uri: str,
    rows: pa.Table,
    *,
    shard_rows: int = 1000,
    unit_rows: int = 10,
    analysis: Analysis = "english",
    model_hash: str | None = None,
    index: IndexConfig = IndexConfig(),
) -> None:
    """A certified memory of these documents, by build-index's own functions."""
    build, dim = join(uri, "build"), rows.schema.field("image_embedding").type.list_size
    create_table(uri, dim)
    write_bytes(join(build, DROPPED), b"")
    groups = deal(stage(build, rows, min(unit_rows, shard_rows)), shard_rows, shards=0, documents=0)
    writer = ShardWriter(uri, build, dim, analysis)
    written = [writer(group.unit("shard").payload) for group in groups]
    publish_memory(uri, written, len(rows), dim, analysis=analysis, model_hash=model_hash, index=index)
    delete(build)


def run_here(what: str, units: Sequence[Unit], make_worker: Callable[[], Any]) -> list[Receipt]:
    """As the session of a job does, in this process."""
    return [make_worker()(unit.payload) for unit in units]


def publish_memory(
    uri: str,
    written: list[dict[str, Any]],
    count: int,
    dim: int,
    *,
    analysis: Analysis = "english",
    model_hash: str | None = None,
    index: IndexConfig = IndexConfig(),
) -> None:
    """Commit, index and certify shards that `ShardWriter` wrote."""
    facts = commit_memory(uri, written, count, dim, analysis=analysis, model_hash=model_hash)
    facts["indexes"] = build_indexes(uri, join(uri, "build"), facts, index, run_here)
    certify_memory(uri, facts, count)


def commit_memory(
    uri: str,
    written: list[dict[str, Any]],
    count: int,
    dim: int,
    *,
    analysis: Analysis = "english",
    model_hash: str | None = None,
) -> dict[str, Any]:
    """Make written shards a tagged version; facts of its certificate."""
    ids_sum = sum(int(receipt["ids_sum"], 16) for receipt in written)
    tag = version_tag(model_hash or MODEL_HASH, analysis, KEY_FRAMES, count, ids_sum)
    facts = {
        "memory_version": tag,
        "versions": [tag],
        "model_hash": model_hash or MODEL_HASH,
        "model": {"name": "offline"},
        "dim": dim,
        "analysis": analysis,
        "ids_sum": f"{ids_sum:x}",
        "shards": [asdict(shard) for shard in commit(uri, written, first=0, version=tag)],
    }
    publish(uri, facts, smallest(written, 0))
    return facts


def certify_memory(uri: str, facts: dict[str, Any], count: int) -> None:
    """Tag the version with its indexes, and certify it."""
    tag_latest(uri, facts["memory_version"])
    certificate = Certificate(
        job="build-index",
        config_hash="0",
        num_in=count,
        num_out=count,
        facts=facts,
        files=own_files(uri, facts),
    )
    write_certificate(uri, certificate)
