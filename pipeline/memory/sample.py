"""Holds a vector index to its recall, on a sample of queries that is drawn once, kept, and grown.

The declared recall is met if the 95 % lower bound on the sample says so.

Exact answers cost a pass over all vectors. A memory that grows by a little keeps its sample: the lists of
true neighbours are merged with the new documents' cosines, and some of the queries make place for ones
drawn from the new documents, in proportion, so that it stays a fair sample of the whole. What the index
answered is kept too: rows that no index holds are scanned exactly beside it, so its answers on the grown
table are the old ones merged with the new documents, and need not be asked for again.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from infra.certificate import Certificate, check_files
from infra.errors import DataError
from infra.storage import delete, exists, join, list_files, read_bytes, write_bytes
from pipeline.memory.recall import (
    Exact,
    IndexConfig,
    K,
    exact_neighbours,
    hits,
    lower_bound,
    merge,
    queries_for,
    sample_queries,
    width,
    without,
)
from pipeline.memory.store import EMBEDDINGS, sorted_columns, stream_vectors
from pipeline.memory.vectors import Setting, unit, vector_search

FOLDER = "recall"
NUM_QUERIES, NUM_TUNING_QUERIES = 1000, 200
"""Held-out queries of the verification, for each column and kind of query, and other ones on which the search
settings are tuned. Ours: the bound then lies within 0.003 of a recall of 1."""
FLAT_QUERIES = 50
"""A scan is exact by construction; so many queries check that it is one."""
SPOT_CHECKS = 20
"""Kept answers of a grown memory that are asked for again, of each kind of query."""
MAX_SPOT_LOSS = 0.005
"""Recall that the answers asked for again may lack: one hit of the 200 of 20 queries."""
TEXT = "text_embedding"

Sample = dict[str, Exact]
"""By the column that the queries' vectors come from."""
NewRows = Iterable[tuple[pa.Array, dict[str, np.ndarray]]]
"""Blocks of (doc_id, vectors `n d` by column) of the documents that were added."""


@dataclass(frozen=True)
class Growth:
    """How a memory became larger."""

    kept: dict[str, Sample]
    """The samples that its last build was verified on, by searched column."""
    new_rows: Callable[[], NewRows]
    removed: frozenset[str] = frozenset()
    """Documents that are no longer there."""


def asked(table: Any, column: str) -> list[str]:
    """Columns whose vectors are asked against `column`: captions (if of one width), and its own."""
    kind = next((name for name in EMBEDDINGS if column.startswith(name)), column)
    text = TEXT + column.removeprefix(kind)  # another CLIP's columns carry its hash
    names = [text, column] if text in table.schema.names else [column]
    dims = {name: table.schema.field(name).type.list_size for name in names}
    return [name for name in dict.fromkeys(names) if dims[name] == dims[column]]


def draw(table: Any, column: str, config: IndexConfig, setting: Setting, *, seed: int) -> tuple[Sample, Sample]:
    """(tuning, held out): disjoint samples of documents with the exact answers, from one pass."""
    ids = sorted_columns(table, ["doc_id"])["doc_id"].to_pylist()
    order = np.random.default_rng(seed).permutation(len(ids))
    tuning = 10 if setting.kind == "flat" else NUM_TUNING_QUERIES
    tuning = min(tuning, len(ids) // 4 or 1)
    enough = max(NUM_QUERIES, queries_for(config.recall))
    held_out = min(NUM_QUERIES, FLAT_QUERIES) if setting.kind == "flat" else enough
    chosen = [ids[i] for i in order[: tuning + held_out]]
    parts = [chosen[:tuning], chosen[tuning:] or chosen]
    names = [(query, part) for query in asked(table, column) for part in (0, 1)]
    drawn = [sample_queries(table, query, parts[part]) for query, part in names]
    vectors = np.concatenate([vectors for vectors, _ in drawn])
    own = [doc_id for _, ids in drawn for doc_id in ids]
    exact = exact_neighbours(stream_vectors(table, column), vectors, own, k=K)
    found: tuple[Sample, Sample] = ({}, {})
    start = 0
    for (query, part), (some, _) in zip(names, drawn, strict=True):
        found[part][query] = exact.take(slice(start, start + len(some)))
        start += len(some)
    return found


def grown(table: Any, column: str, setting: Setting, growth: Growth) -> Sample:
    """The kept sample of a column, brought up to the table that grew, with the index's answers if kept.

    Raises:
        KeyError: there is no sample of this column.
    """
    random = np.random.default_rng([0, 7])
    blocks = list(growth.new_rows())
    own_blocks = [(ids, vectors[column]) for ids, vectors in blocks]
    new_ids = [doc_id for ids, _ in blocks for doc_id in ids.to_pylist()]
    found: Sample = {}
    for query in asked(table, column):
        old = growth.kept[column][query]
        if old.answers is not None:
            old = replace(old, answers=merge(old.answers, own_blocks).forget(growth.removed))
        old = without(merge(old, own_blocks), growth.removed, k=K)
        share = len(new_ids) / max(table.count_rows(), 1)
        count = min(len(new_ids), math.ceil(share * len(old)))
        picked = set(random.choice(len(new_ids), count, replace=False).tolist()) if count else set()
        vectors = np.concatenate([unit(v[query]) for _, v in blocks]) if blocks else old.queries[:0]
        rows = [n for n in sorted(picked) if new_ids[n] not in growth.removed]
        new = _exact_by_scan(table, column, vectors[rows], [new_ids[n] for n in rows])
        if old.answers is not None:
            new = answered(table, column, new, setting)
        stay = np.sort(random.permutation(len(old))[: max(len(old) - len(new), 0)])
        both = _concat(old.take(stay), new)
        found[query] = both.take(random.permutation(len(both)))
    return found


def answered(table: Any, column: str, exact: Exact, setting: Setting) -> Exact:
    """With the index's answers: one more than k, for a query may find its own document."""
    answers = vector_search(table, column, exact.queries, setting, k=K + 1) if len(exact) else []
    return replace(exact, answers=_lists(exact.queries, exact.own_ids, answers, K + 1))


def _exact_by_scan(table: Any, column: str, queries: np.ndarray, own: list[str]) -> Exact:
    """The true neighbours of a few queries: LanceDB reads all vectors once for them."""
    keep = width(K)
    answers = vector_search(table, column, queries, None, k=keep) if len(own) else []
    return _lists(queries, own, answers, keep)


def _lists(queries: np.ndarray, own: list[str], answers: list[list[tuple[str, float]]], keep: int) -> Exact:
    ids, scores = np.full((len(own), keep), None, object), np.full((len(own), keep), -np.inf, np.float32)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = [doc_id for doc_id, _ in answer]
        scores[row, : len(answer)] = [score for _, score in answer]
    return Exact(queries, own, ids, scores)


def _concat(one: Exact, other: Exact) -> Exact:
    known = one.answers is not None and other.answers is not None
    return Exact(
        np.concatenate([one.queries, other.queries]),
        [*one.own_ids, *other.own_ids],
        np.concatenate([one.ids, other.ids]),
        np.concatenate([one.scores, other.scores]),
        _concat(one.answers, other.answers) if known else None,  # pyright: ignore[reportArgumentType]
    )


def verify(
    table: Any, column: str, config: IndexConfig, setting: Setting, sample: Sample
) -> tuple[dict[str, Any], Sample] | None:
    """(the certificate's facts, the sample with the index's answers) if it meets the declared recall."""
    asked = {query: answered(table, column, exact, setting) for query, exact in sample.items()}
    facts = judge(config, setting, asked)
    return None if facts is None else (facts, asked)


def judge(config: IndexConfig, setting: Setting, sample: Sample) -> dict[str, Any] | None:
    """The certificate's facts of answers that meet the declared recall; else None."""
    found = {}
    for query, exact in sample.items():
        recalls = recalls_of(exact)
        mean = float(np.mean(recalls)) if len(recalls) else 0.0
        # A scan of everything is exact by construction: the sample only checks that it is one.
        lower = mean if setting.kind == "flat" and mean > 1 - 1e-3 else lower_bound(recalls)
        if lower < config.recall:
            return None
        found[query] = {
            "recall": round(mean, 6),
            "recall_lower_95": round(lower, 6),
            "queries": len(recalls),
        }
    return {
        "setting": asdict(setting),
        "k": K,
        "declared_recall": config.recall,
        "by_query": found,
    }


def verify_grown(
    table: Any, column: str, config: IndexConfig, setting: Setting, growth: Growth
) -> tuple[dict[str, Any], Sample] | None:
    """Hold the index of a memory that grew to its recall, with its kept settings and its kept sample.

    Only what is new is asked for: the kept answers are merged with the new documents, which the index
    doesn't hold and LanceDB therefore scans. That it does is checked on a few; where they differ, and
    where no answers were kept, all queries are asked.
    """
    if column not in growth.kept:
        return None
    sample = grown(table, column, setting, growth)
    if all(_is_as_kept(table, column, setting, exact) for exact in sample.values()):
        facts = judge(config, setting, sample)
        return None if facts is None else (facts, sample)
    return verify(table, column, config, setting, sample)


def _is_as_kept(table: Any, column: str, setting: Setting, exact: Exact) -> bool:
    if exact.answers is None or not len(exact):
        return False
    some = exact.take(slice(0, SPOT_CHECKS))  # the sample lies in random order
    again = recalls_of(answered(table, column, some, setting))
    kept = recalls_of(some)
    return float(np.mean(again)) >= float(np.mean(kept)) - MAX_SPOT_LOSS


def recalls_of(exact: Exact) -> np.ndarray:
    """Recall of each query by the answers that the sample carries."""
    assert exact.answers is not None
    return hits(exact, exact.answers.lists(), k=K)


def save(out: str, tag: str, samples: dict[str, Sample]) -> None:
    """Write the samples of all columns, each query one row; beside the memory, under its tag."""
    tables = [
        pa.table(
            {
                "column": [column] * len(exact),
                "query": [query] * len(exact),
                "own_id": exact.own_ids,
                "vector": pa.array(list(exact.queries), pa.list_(pa.float32())),
                "ids": pa.array(exact.ids.tolist(), pa.list_(pa.string())),
                "scores": pa.array(list(exact.scores), pa.list_(pa.float32())),
                "answer_ids": pa.array(_nested(exact, "ids"), pa.list_(pa.string())),
                "answer_scores": pa.array(_nested(exact, "scores"), pa.list_(pa.float32())),
            }
        )
        for column, sample in samples.items()
        for query, exact in sample.items()
    ]
    if not tables:
        return
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    write_bytes(place_of(out, tag), sink.getvalue().to_pybytes())


def load(out: str, certificate: Certificate) -> dict[str, Sample] | None:
    """What `save` wrote of a certified memory; None if there is none or a damaged one: then one is drawn."""
    place = place_of(out, str(certificate.facts["memory_version"]))
    if not exists(place):
        return None
    try:
        check_files(out, [entry for entry in certificate.files if place.endswith(f"/{entry.path}")])
        table = pa.ipc.open_file(pa.py_buffer(read_bytes(place))).read_all()
    except (OSError, pa.ArrowException, DataError):
        return None
    if "answer_ids" not in table.schema.names:
        return None
    samples: dict[str, Sample] = {}
    for batch in table.to_batches():
        vectors, own = np.stack(batch["vector"].to_numpy(zero_copy_only=False)), batch["own_id"].to_pylist()
        exact = Exact(vectors, own, *_columns(batch, "ids", "scores"))
        if not batch.column("answer_ids").null_count:
            answers = Exact(vectors, own, *_columns(batch, "answer_ids", "answer_scores"))
            exact = replace(exact, answers=answers)
        samples.setdefault(batch["column"][0].as_py(), {})[batch["query"][0].as_py()] = exact
    return samples


def _nested(exact: Exact, name: str) -> list[Any]:
    if exact.answers is None:
        return [None] * len(exact)
    return getattr(exact.answers, name).tolist()


def _columns(batch: pa.RecordBatch, ids: str, scores: str) -> tuple[np.ndarray, np.ndarray]:
    width = len(batch[ids][0])
    names = np.asarray(batch[ids].flatten().to_pylist(), object).reshape(-1, width)
    return names, np.asarray(batch[scores].flatten()).reshape(-1, width)


def keep_only(out: str, tag: str) -> None:
    """Delete the samples of other versions: only the newest one grows."""
    for place in list_files(join(out, FOLDER), suffix=".arrow"):
        if not place.endswith(f"/{tag}.arrow"):
            delete(place)


def place_of(out: str, tag: str) -> str:
    return join(out, FOLDER, f"{tag}.arrow")
