"""Laws of recall: it is measured against brute force, met or the build fails, and kept as the memory grows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.certificate import Certificate
from infra.errors import ConfigError, DataError
from pipeline.memory import sample
from pipeline.memory.commit import create_table
from pipeline.memory.index import build_vector_index, finish
from pipeline.memory.recall import IndexConfig, exact_neighbours, hits, lower_bound, merge, queries_for, without
from pipeline.memory.sample import Growth, answered, load, save
from pipeline.memory.store import upsert, vectors_arrow, vectors_numpy
from pipeline.memory.vectors import Setting, vector_search
from tests.pipeline.memory.memory_tables import documents, planted


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "NUM_QUERIES", 300)
    monkeypatch.setattr(sample, "NUM_TUNING_QUERIES", 60)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 10**6))
def test_exact_neighbours_equal_brute_force(count: int, k: int, seed: int) -> None:
    vectors = planted(count, seed=seed).astype(np.float16)
    ids = [f"{i:04d}" for i in range(count)]
    blocks = [(pa.array(ids[i : i + 64]), vectors[i : i + 64]) for i in range(0, count, 64)]
    queries = planted(5, seed=seed + 1)
    exact = exact_neighbours(blocks, queries, ["0000", "-", "-", "-", "-"], k=k)
    cosines = (
        queries @ (vectors.astype(np.float32) / np.linalg.norm(vectors.astype(np.float32), axis=1)[:, None]).T
    )
    cosines[0, 0] = -2  # the query's own document doesn't count
    order = np.argsort(-cosines, axis=1)
    answers = [[ids[j] for j in row if cosines[i, j] > -2] for i, row in enumerate(order)]
    assert np.allclose(hits(exact, answers, k=k), 1.0)


@pytest.mark.parametrize("kind", ["flat", "rq"])
def test_a_picture_with_many_captions_does_not_spoil_the_recall(tmp_path: Path, kind: str) -> None:
    """More equal documents than a sample's lists hold: any of them is as good as another."""
    rows = documents(1200, dim=16)
    few = np.repeat(planted(12, dim=16, seed=9), 100, axis=0)
    place = rows.schema.get_field_index("image_embedding")
    rows = rows.set_column(place, rows.schema.field(place), vectors_arrow(few))
    table = create_table(str(tmp_path), 16)
    upsert(table, rows)
    config = IndexConfig.model_validate({"kind": kind, "columns": ("image_embedding",)})
    facts, _, _ = build_vector_index(table, "image_embedding", config)
    assert facts["by_query"]["image_embedding"]["recall"] == 1.0


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=400))
def test_the_lower_bound_lies_under_the_mean(values: list[int]) -> None:
    recalls = np.array(values) / 10
    assert 0 <= lower_bound(recalls) <= recalls.mean() + 1e-12


@pytest.mark.parametrize(
    ("missing", "recall"), [(0.03, 0.3), (0.02, 0.0), (0.05, 0.9), (0.1, 0.8), (0.004, 0.0), (0.3, 0.9)]
)
def test_the_lower_bound_holds_in_19_of_20_samples(missing: float, recall: float) -> None:
    """Queries that find nothing, or miss a few: rare and total misses are the ones that samples overlook."""
    random = np.random.default_rng(0)
    population = np.where(random.random(100_000) < missing, recall, 1.0)  # hits of a query hang together
    bounds = [lower_bound(random.choice(population, 300)) for _ in range(400)]
    assert np.mean(np.array(bounds) <= population.mean()) >= 0.95


def test_full_recall_on_enough_queries_proves_the_declared_one() -> None:
    assert lower_bound(np.ones(queries_for(0.98))) >= 0.98
    assert lower_bound(np.ones(queries_for(0.98) - 5)) < 0.98


def test_a_quantised_index_meets_the_declared_recall(tmp_path: Path) -> None:
    table = create_table(str(tmp_path), 32)
    upsert(table, documents(6000, dim=32))
    config = IndexConfig(kind="rq", columns=("image_embedding",))
    facts, measured, _ = build_vector_index(table, "image_embedding", config)
    lowest = facts["by_query"]["image_embedding"]["recall_lower_95"]
    assert lowest >= 0.98 and facts["by_query"]["image_embedding"]["queries"] == 300
    assert measured["index_bytes"] < 6000 * 32 * 2
    setting = Setting(**facts["setting"])
    queries = planted(4, start=6000, dim=32)
    approximate = vector_search(table, "image_embedding", queries, setting, k=10)
    exact = vector_search(table, "image_embedding", queries, None, k=10)
    agree = [len({d for d, _ in a} & {d for d, _ in e}) for a, e in zip(approximate, exact, strict=True)]
    assert min(agree) >= 8


def test_a_recall_that_is_not_met_fails_the_build_and_says_what_would(tmp_path: Path) -> None:
    table = create_table(str(tmp_path), 32)
    upsert(table, documents(500, dim=32))
    strict = IndexConfig(kind="rq", columns=("image_embedding",), recall=0.999)  # asks for 4,524 queries
    with pytest.raises(DataError, match=r"declared 0.999; would meet it: kind=flat"):
        build_vector_index(table, "image_embedding", strict)
    tight = IndexConfig(kind="hnsw", columns=("image_embedding",), max_index_bytes=1000)
    with pytest.raises(ConfigError, match="max_index_bytes of at least"):
        build_vector_index(table, "image_embedding", tight)


def certified(version: str) -> Certificate:
    """The certificate of a memory of this version."""
    return Certificate(job="x", config_hash="x", num_in=0, num_out=0, facts={"memory_version": version})


def new_rows(rows: pa.Table):
    """What the committer says of documents that were added."""
    names = [name for name in rows.schema.names if name.endswith("_embedding")]
    for batch in rows.combine_chunks().to_batches():
        yield batch["doc_id"], {name: vectors_numpy(batch[name]) for name in names}


def test_small_additions_keep_the_indexes_and_are_found(tmp_path: Path) -> None:
    table = create_table(str(tmp_path), 16)
    upsert(table, documents(100))
    config = IndexConfig()
    done = finish(table, config)
    kept = {i.index_uuid for i in table.list_indices()}
    extra = documents(5, start=100, texts=[f"a zebra {i}" for i in range(5)])
    upsert(table, extra)
    save(str(tmp_path), "first", done.samples)
    growth = Growth(load(str(tmp_path), certified("first")) or {}, lambda: new_rows(extra))
    done = finish(table, config, before={"indexes": done.facts}, growth=growth)
    assert {i.index_uuid for i in table.list_indices()} == kept
    assert set(done.facts) == set(config.columns)
    found = table.search("zebra", query_type="fts").limit(9).select(["text", "_score"]).to_arrow()
    assert len(found) == 5
    many = documents(60, start=105)
    upsert(table, many)
    growth = Growth(done.samples, lambda: new_rows(many))
    finish(table, config, before={"indexes": done.facts}, growth=growth)
    assert not {i.index_uuid for i in table.list_indices()} & kept


@settings(max_examples=15, deadline=None)
@given(st.integers(30, 120), st.integers(1, 40), st.integers(0, 10), st.integers(0, 10**6))
def test_a_sample_that_grew_is_as_exact_as_a_new_one(old: int, new: int, gone: int, seed: int) -> None:
    vectors = planted(old + new, seed=seed).astype(np.float16)
    ids = [f"{i:04d}" for i in range(old + new)]
    queries, own = planted(6, seed=seed + 1), ["0000", *["-"] * 5]
    first = exact_neighbours([(pa.array(ids[:old]), vectors[:old])], queries, own, k=5)
    added = [(pa.array(ids[old - 3 :]), vectors[old - 3 :])]  # three are known already
    removed = frozenset(ids[i] for i in np.random.default_rng(seed).permutation(old + new)[:gone])
    grown = without(merge(merge(first, added), added), removed, k=5)
    stay = [i for i in range(old + new) if ids[i] not in removed]
    fresh = exact_neighbours([(pa.array([ids[i] for i in stay]), vectors[stay])], queries, own, k=5)
    assert len(grown) >= 1 if gone <= 5 else True
    for row in range(len(grown)):
        place = next(n for n in range(6) if np.array_equal(grown.queries[row], queries[n]))
        found, expected = grown.truth(row, 5), fresh.truth(place, 5)
        assert found[1] == pytest.approx(expected[1], abs=1e-5)
        best = {d for d, s in expected[0].items() if s > expected[1] + 1e-5}
        assert best <= set(found[0])


def test_growth_is_verified_and_a_spoilt_index_is_built_anew(tmp_path: Path) -> None:
    table = create_table(str(tmp_path), 32)
    upsert(table, documents(3000, dim=32))
    config = IndexConfig(kind="rq", columns=("image_embedding",), recall=0.95)
    done = finish(table, config)
    extra = documents(30, dim=32, start=3000)
    upsert(table, extra)
    growth = Growth(done.samples, lambda: new_rows(extra))
    again = finish(table, config, before={"indexes": done.facts}, growth=growth)
    assert "verify_s" in again.measured and "text_index_s" not in again.measured
    asked = again.facts["image_embedding"]["by_query"]["image_embedding"]
    assert asked["recall_lower_95"] >= 0.95 and asked["queries"] == 300
    assert set(again.samples["image_embedding"]["image_embedding"].own_ids) & set(extra["doc_id"].to_pylist())
    for exact in again.samples["image_embedding"].values():  # merged, not asked for; and yet the same
        setting = Setting(**again.facts["image_embedding"]["setting"])
        fresh = answered(table, "image_embedding", exact, setting)
        assert exact.answers is not None and fresh.answers is not None
        assert np.allclose(np.sort(exact.answers.scores), np.sort(fresh.answers.scores), atol=1e-3)
    save(str(tmp_path), "grown", again.samples)
    loaded = (load(str(tmp_path), certified("grown")) or {})["image_embedding"]["image_embedding"]
    kept = again.samples["image_embedding"]["image_embedding"].answers
    assert loaded.answers is not None and kept is not None and loaded.answers.lists() == kept.lists()
    weak = {
        "image_embedding": done.facts["image_embedding"]
        | {"setting": {"kind": "rq", "num_bits": 1, "nprobes": 1}}
    }
    rebuilt = finish(table, config, before={"indexes": weak}, growth=growth)
    assert "text_index_s" in rebuilt.measured
