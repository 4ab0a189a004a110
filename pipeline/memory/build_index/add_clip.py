"""`vimi-data build-index --add-clip NAME`: another CLIP's vectors beside the first, in columns of their own.

The stored pictures and texts are embedded; not one old byte is written again, and older versions stay as
they were. Killed at any moment, the same command continues.

LanceDB's `merge_insert` with a source that holds only some columns rewrites whole rows, pictures and all
(measured: 2,540 kB for 16 kB of new vectors), unless the join column has a scalar index: then it writes a
file of the new column alone (20 kB). So the index comes first.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from infra.certificate import Certificate
from infra.clip import ClipConfig, check_clip
from infra.errors import ConfigError, DataError, first_line
from infra.pictures import PictureError, decode_picture
from infra.storage import delete, join, read_bytes, write_bytes
from pipeline.job import JobConfig, carry_out, run_units
from pipeline.journal import Receipt, Receipts, Unit
from pipeline.memory import Memory, model_column, open_memory, open_table, sample
from pipeline.memory.build_index.job import worker_resources
from pipeline.memory.embed.pictures import Picture
from pipeline.memory.embed.streams import CPU_BATCH, GPU_BATCH, Streams, ahead, batches, settle_process
from pipeline.memory.embed.worker import arrow_bytes, image_vectors, start_texts
from pipeline.memory.index import build_id_index, build_vector_index
from pipeline.memory.recall import IndexConfig
from pipeline.memory.store import EMBEDDINGS, memory_files, tag_table, vectors_arrow, version_tag
from pipeline.memory.vectors import document_vector
from pipeline.schema import RowError, Status, content_id

ROWS_PER_UNIT = 512
"""Documents of one unit of work. Ours."""


class AddClipConfig(JobConfig):
    """Which CLIP is added to which memory, in `out`."""

    clip: ClipConfig
    """The CLIP that is added."""
    index: IndexConfig = IndexConfig()
    """What the new columns' indexes must reach; `columns` names the vectors that get one."""


def check(config: AddClipConfig) -> str:
    """Refuse what can be refused; the plan in words."""
    memory = open_memory(config.out)
    check_clip(config.clip)
    return f"{memory.num_documents:,} documents of {memory.version}, embedded by {config.clip.name} too"


def run(config: AddClipConfig) -> Certificate:
    """Embed what is stored, add the columns, index, verify, tag, certify.

    Raises:
        ConfigError: no memory, an unknown CLIP, or the one that the memory has already.
        DataError: a recall below the declared one.
    """
    check(config)
    memory = open_memory(config.out)
    folder = join(memory.uri, "add-clip", content_id(memory.version, config.clip.hash())[:12])
    ids = memory.columns_arrow(["doc_id"])["doc_id"].to_pylist()
    units = [
        Unit(content_id("add-clip", memory.version, start), {"ids": ids[start : start + ROWS_PER_UNIT]})
        for start in range(0, len(ids), ROWS_PER_UNIT)
    ]

    def embed() -> Receipts:
        device, threads, resources = worker_resources(config)
        adder = Adder(memory.uri, memory.version, config.clip, folder, device, threads)
        return run_units(folder, units, adder, what="add-clip", total=len(units), **resources)

    certificate = carry_out(
        config,
        work=embed,
        finish=lambda receipts: _commit(config, memory, folder, [r for _, r in receipts.in_order(units)]),
    )
    delete(join(memory.uri, "add-clip"))
    sample.keep_only(memory.uri, certificate.facts["memory_version"])
    return certificate


def _commit(config: AddClipConfig, memory: Memory, folder: str, receipts: list[Receipt]) -> Certificate:
    """Staged vectors -> new columns, their indexes, a tag; the certificate that proves them."""
    model, out = _one_model(receipts, memory), memory.uri
    table = open_table(out)
    if table is None:
        raise DataError(f"the table of {out} is gone")
    for name in EMBEDDINGS:
        add_column(table, model_column(name, model["model_hash"]), model["dim"])
    for receipt in receipts:
        fill_columns(table, _read(folder, receipt))
    facts, samples = _index(table, config, model["model_hash"])
    certificate = _certificate(memory, table, config, model, facts)
    tag = certificate.facts["memory_version"]
    sample.save(out, tag, (sample.load(out, memory.certificate) or {}) | samples)
    tag_table(table, tag)
    return certificate.model_copy(update={"files": memory_files(out, sample.place_of(out, tag))})


@dataclass(frozen=True)
class Adder:
    """Makes the worker: stored documents in, a staged file of their new vectors out."""

    uri: str
    version: str
    clip: ClipConfig
    folder: str
    device: str
    threads: int

    def __call__(self) -> Callable[[dict[str, Any]], Receipt]:
        from infra.clip import load_clip

        settle_process(self.device)
        rows = GPU_BATCH if self.device != "cpu" else CPU_BATCH
        clip = load_clip(self.clip, self.device, batch_size=rows)
        memory, streams = open_memory(self.uri, version=self.version), Streams.make(self.device, self.threads)
        return lambda payload: self.run(payload["ids"], memory, clip, streams)

    def run(self, ids: list[str], memory: Memory, clip: Any, streams: Streams) -> Receipt:
        rows = memory.rows(ids, ["text", "image"])
        texts = start_texts(clip, rows["text"].to_pylist(), streams)
        decoded = ahead(
            streams.decoders,
            lambda data: stored_picture(data, clip),
            rows["image"].to_pylist(),
            depth=2 * streams.num_decoders + clip.batch_size,
        )
        groups = batches(enumerate(decoded), clip.batch_size)
        embedded = ahead(streams.models, lambda g: image_vectors(clip, g), groups, depth=streams.num_models)
        found = [(n, vector) for group in embedded for n, _, vector in group if vector is not None]
        kept = [n for n, _ in found]
        image = np.stack([v for _, v in found]) if found else np.empty((0, clip.dim), np.float32)
        text = texts()[kept]
        vectors = {"image": image, "text": text, "document": document_vector(image, text)}
        names = [model_column(f"{name}_embedding", clip.model_hash) for name in vectors]
        table = pa.table(
            {
                "doc_id": rows["doc_id"].take(pa.array(kept, pa.int64())).combine_chunks(),
                **dict(zip(names, map(vectors_arrow, vectors.values()), strict=True)),
            }
        )
        data = arrow_bytes(table)
        digest = hashlib.sha256(data).hexdigest()
        write_bytes(join(self.folder, "staged", f"{digest[:32]}.arrow"), data)
        model = {"model": clip.identity, "model_hash": clip.model_hash, "dim": clip.dim}
        return {"file": f"{digest[:32]}.arrow", "sha256": digest, "notes": {Status.OK.value: len(kept)}} | model


def stored_picture(data: bytes | None, clip: Any) -> Picture | RowError:
    """A document's own picture at the model's size."""
    try:
        image = decode_picture(data or b"")
    except PictureError as error:
        return RowError(Status.UNDECODABLE, str(error))
    return Picture(clip.preprocessing.batch([image]), b"", 0, image.width, image.height)


def _one_model(receipts: list[Receipt], memory: Memory) -> dict[str, Any]:
    hashes = {receipt["model_hash"] for receipt in receipts}
    if len(hashes) != 1:
        raise DataError(f"{memory.uri} would mix vectors of {len(hashes)} models: weights changed")
    if hashes & {memory.model_hash, *memory.certificate.facts.get("clips", {})}:
        raise ConfigError(f"{memory.uri} has the vectors of this CLIP already", cure="name another one")
    return {name: receipts[0][name] for name in ("model", "model_hash", "dim")}


def _read(folder: str, receipt: Receipt) -> pa.Table:
    data = read_bytes(join(folder, "staged", receipt["file"]))
    if hashlib.sha256(data).hexdigest() != receipt["sha256"]:
        raise DataError(f"staged file {receipt['file']} differs from its receipt: delete {folder}, start again")
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def add_column(table: Any, name: str, dim: int) -> None:
    """Add an empty embedding column; nothing to do if it is there.

    Raises:
        DataError: there is a column of this name with another size.
    """
    if not any(index.columns == ["doc_id"] for index in table.list_indices()):
        build_id_index(table)
    kind = pa.list_(pa.float16(), dim)
    if name not in table.schema.names:
        table.add_columns(pa.field(name, kind))
    elif table.schema.field(name).type != kind:
        raise DataError(f"column {name} holds {table.schema.field(name).type}, not {kind}")


def fill_columns(table: Any, rows: pa.Table) -> int:
    """Write columns of rows that are there: doc_id and what is new; one atomic commit."""
    schema = pa.schema([table.schema.field(name) for name in rows.schema.names])
    try:
        result = table.merge_insert("doc_id").when_matched_update_all().execute(rows.cast(schema))
    except (OSError, RuntimeError, ValueError) as error:
        names = ", ".join(rows.schema.names[1:])
        raise DataError(f"can't write column {names}: {first_line(error)}") from error
    return int(result.num_updated_rows)


def _index(
    table: Any, config: AddClipConfig, model_hash: str
) -> tuple[dict[str, Any], dict[str, sample.Sample]]:
    names = tuple(model_column(name, model_hash) for name in config.index.columns)
    index = config.index.model_copy(update={"columns": names})
    facts, samples = {}, {}
    for name in names:
        facts[name], _, samples[name] = build_vector_index(table, name, index)
    return facts, samples


def _certificate(
    memory: Memory, table: Any, config: AddClipConfig, model: dict[str, Any], indexes: dict[str, Any]
) -> Certificate:
    facts = memory.certificate.facts
    clips = facts.get("clips", {}) | {
        model["model_hash"]: model | {"config": config.clip.model_dump(mode="json")}
    }
    tag = version_tag(table, "+".join([memory.model_hash, *sorted(clips)]))
    lows = [v["recall_lower_95"] for index in indexes.values() for v in index["by_query"].values()]
    return memory.certificate.model_copy(
        update={
            "facts": facts
            | {
                "clips": clips,
                "indexes": facts["indexes"] | indexes,
                "memory_version": tag,
                "versions": list(dict.fromkeys([*facts["versions"], tag])),
                "highlights": facts.get("highlights", {})
                | {"version": tag, "added": config.clip.name, "recall@k at least": f"{min(lows):.3f}"},
            }
        }
    )
