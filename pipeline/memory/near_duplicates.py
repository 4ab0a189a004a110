"""Which pairs of documents are near-duplicates: by hashes, by an index, or by all cosines."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from infra.config import Config
from pipeline.memory.index import make_index
from pipeline.memory.recall import sample_queries
from pipeline.memory.store import stream_vectors
from pipeline.memory.vectors import Setting, cosines, unit, vector_search

Edge = tuple[int, int, float]
COLUMN = "image_embedding"
"""Vectors that are compared."""
NEIGHBOURS = 32
"""Nearest documents that are looked at of each, in tables beyond `EXACT_ROWS`. Ours."""
EXACT_ROWS = 50_000
"""Tables up to this size are compared pair by pair by cosines, where those decide alone (about a minute at
this size); up to four times as many by hashes. Ours."""
RAGME_COSINE = 0.94
CALIBRATION_DOCS = 1000
"""Documents whose pairs calibrate the bound: half a million pairs."""
SEARCH = Setting("rq", num_bits=1, nprobes=64, refine=20)
"""Recall@10 of 1.000 on 100,000 clustered vectors (measured): enough to find neighbours above 0.9."""


class DedupConfig(Config):
    """What counts as the same document, and what becomes of it."""

    mode: Literal["off", "report", "drop"] = "report"
    """report = list them in `duplicates.parquet`; drop = leave all but one of each group out, counted as
    filtered_duplicate or filtered_near_duplicate."""
    min_cosine: float | None = Field(default=None, gt=0, le=1)
    """Least cosine of two near-duplicates. None = calibrated to the encoder, from random pairs of this
    memory (`calibrate`): 0.94 (RAGME, for CLIP ViT vectors of clips) at a strong one."""
    max_phash_bits: int | None = Field(default=10, ge=0, le=64)
    """The perceptual hashes must also differ in at most this many of 64 bits; None = the cosine decides
    alone. Vectors tell what a picture is about, hashes whether it is the same picture: of 5.8 million
    pairs of 3,395 film stills, the offline CLIP put 36,568 above 0.94, and 21 of these had alike hashes;
    stills compressed and halved again stayed within 4 bits (measured). 10 is the guard's bound."""


def calibrate(table: Any, config: DedupConfig, ids: list[str]) -> float:
    """The least cosine of near-duplicates for the encoder that made this memory, from random pairs.

    A weak encoder puts strangers close together and re-encoded pictures far apart, a strong one neither.
    With hashes to decide, the cosine only has to say "closer than nine of ten strangers", and RAGME's
    bound is enough for any encoder. Alone it must leave out all but one of 100,000 strangers, and RAGME's
    bound is the least.
    """
    if len(ids) < CALIBRATION_DOCS // 10:
        return RAGME_COSINE
    some = [ids[n] for n in np.linspace(0, len(ids) - 1, min(len(ids), CALIBRATION_DOCS)).astype(int)]
    vectors, _ = sample_queries(table, COLUMN, list(dict.fromkeys(some)))
    strangers = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    if config.max_phash_bits is not None:
        return min(max(round(float(np.quantile(strangers, 0.9)), 4), 0.5), RAGME_COSINE)
    return min(max(round(float(np.quantile(strangers, 1 - 1e-5)), 4), RAGME_COSINE), 0.9999)


def by_hash(
    table: Any, rows: pa.Table, config: DedupConfig, wanted: np.ndarray, bound: float
) -> Iterator[Edge]:
    """All pairs of hashes (`n^2 / 2` comparisons of 64 bits); vectors only of those that are alike.

    Documents with one and the same hash are compared with the first of them, not each with each: a
    corpus may hold a million black frames.
    """
    there = np.flatnonzero(rows["phash"].combine_chunks().is_valid().to_numpy(zero_copy_only=False))
    hashes = rows["phash"].combine_chunks().take(there).to_numpy(zero_copy_only=False).astype(np.uint64)
    unique, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    touched = np.unique(group[np.isin(there, wanted)])
    is_touched = np.isin(np.arange(len(unique)), touched)
    ids = rows["doc_id"].to_pylist()
    same = np.flatnonzero(is_touched[group] & (first[group] != np.arange(len(group))))
    yield from _close(table, ids, config, np.stack([there[first[group[same]]], there[same]], axis=1), bound)
    for start in range(0, len(touched), 256):
        part = touched[start : start + 256]
        first_other = int(part[0]) if is_touched.all() else 0  # the pairs before it are found already
        one, other = _alike_hashes(unique[part], unique[first_other:], config.max_phash_bits or 0)
        other += first_other
        once = (part[one] < other) | ((part[one] != other) & ~is_touched[other])
        pairs = np.stack([there[first[part[one[once]]]], there[first[other[once]]]], axis=1)
        yield from _close(table, ids, config, pairs, bound)


def _alike_hashes(some: np.ndarray, hashes: np.ndarray, max_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of `some`, places in `hashes`) of pairs that differ in at most `max_bits`.

    Blocks that stay in the core's cache: 2.2 ns a pair, a tenth of one pass over all of them.
    """
    rows, places = [], []
    for start in range(0, len(hashes), 4096):
        bits = np.bitwise_count(some[:, None] ^ hashes[None, start : start + 4096])
        if bits.min() <= max_bits:
            one, other = np.nonzero(bits <= max_bits)
            rows.append(one)
            places.append(other + start)
    if not rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(rows), np.concatenate(places)


def _close(table: Any, ids: list[str], config: DedupConfig, pairs: np.ndarray, bound: float) -> Iterator[Edge]:
    """The pairs whose vectors are near too; 4,096 pairs at once bound the memory."""
    for start in range(0, len(pairs), 4096):
        part = pairs[start : start + 4096]
        places = np.unique(part)
        vectors, known = sample_queries(table, COLUMN, [ids[place] for place in places])
        row = {doc_id: number for number, doc_id in enumerate(known)}
        both = [(one, other) for one, other in part.tolist() if ids[one] in row and ids[other] in row]
        left, right = (vectors[[row[ids[pair[side]]] for pair in both]] for side in (0, 1))
        for (one, other), cosine in zip(both, cosines(left, right).tolist(), strict=True):
            if cosine >= bound:
                yield one, other, cosine


def by_index(
    table: Any,
    rows: pa.Table,
    config: DedupConfig,
    wanted: np.ndarray,
    bound: float,
    setting: Setting | None,
) -> Iterator[Edge]:
    """Each document's neighbours from a vector index, the memory's own if it has one."""
    if setting is None:
        make_index(table, COLUMN, SEARCH)
    ids, hashes = rows["doc_id"].to_pylist(), rows["phash"].to_pylist()
    place = {doc_id: number for number, doc_id in enumerate(ids)}
    chosen = pa.array([ids[number] for number in wanted.tolist()])
    for block_ids, block in stream_vectors(table, COLUMN, batch_rows=1024):
        mask = is_in(block_ids, chosen).to_numpy(zero_copy_only=False)
        if not mask.any():
            continue
        some = block_ids.filter(pa.array(mask)).to_pylist()
        answers = vector_search(table, COLUMN, unit(block[mask]), setting or SEARCH, k=NEIGHBOURS)
        for doc_id, answer in zip(some, answers, strict=True):
            for other, cosine in answer:
                edge = place[doc_id], place[other], cosine
                if other != doc_id and cosine >= bound and _alike(hashes, edge, config.max_phash_bits):
                    yield edge


def by_cosine(
    table: Any, ids: list[str], config: DedupConfig, wanted: np.ndarray, bound: float
) -> Iterator[Edge]:
    """All pairs, block by block: `n^2 d` products."""
    place = {doc_id: number for number, doc_id in enumerate(ids)}
    dim = table.schema.field(COLUMN).type.list_size
    vectors = np.zeros((len(ids), dim), np.float32)
    for block_ids, block in stream_vectors(table, COLUMN):
        vectors[[place[doc_id] for doc_id in block_ids.to_pylist()]] = unit(block)
    for start in range(0, len(wanted), 1024):
        part = wanted[start : start + 1024]
        products = vectors[part] @ vectors.T
        for row, column in zip(*np.nonzero(products >= bound), strict=True):
            if part[row] != column:
                yield int(part[row]), int(column), float(products[row, column])


def _alike(hashes: list[int | None], edge: Edge, max_bits: int | None) -> bool:
    if max_bits is None:
        return True
    one, other = hashes[edge[0]], hashes[edge[1]]
    return one is not None and other is not None and (one ^ other).bit_count() <= max_bits


def is_in(values: Any, some: Any) -> Any:
    """`pyarrow.compute.is_in`, which has no type."""
    return pc.call_function("is_in", [values], pc.SetLookupOptions(value_set=some))
