"""Laws of the memory's table: no document twice, none lost, old versions stay, recall is what it says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError, DataError
from infra.storage import join, write_bytes, write_json
from pipeline.embed.worker import arrow_bytes
from pipeline.memory import open_memory, require_model
from pipeline.memory.commit import LEDGER, STAGED, commit_staged, create_table
from pipeline.memory.config import IndexConfig
from pipeline.memory.finish import compact, finish
from pipeline.memory.recall import exact_neighbours, hits, lower_bound, merge, queries_for, without
from pipeline.memory.sample import Growth, answered, load, save
from pipeline.memory.store import sorted_columns, upsert, vectors_arrow, vectors_numpy, version_tag
from pipeline.memory.tune import build_vector_index
from pipeline.memory.vectors import Setting, vector_search
from tests.pipeline.memory_tables import documents, make_memory, planted


def staged(folder: str, tables: list[pa.Table]) -> list[dict]:
    """Staged files with their receipts, as the embedding workers leave them."""
    import hashlib

    receipts = []
    for number, table in enumerate(tables):
        data = arrow_bytes(table)
        write_bytes(join(folder, STAGED, f"{number}.arrow"), data)
        sha256 = hashlib.sha256(data).hexdigest()
        receipts.append({"file": f"{number}.arrow", "sha256": sha256, "documents": len(table)})
    return receipts


def test_documents_are_inserted_once(tmp_path: Path) -> None:
    table = create_table(str(tmp_path), 16)
    assert upsert(table, documents(40)) == 40
    assert upsert(table, documents(40, start=20)) == 20
    assert upsert(table, documents(60)) == 0
    ids = sorted_columns(table, ["doc_id"])["doc_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 60


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_commit_killed_anywhere_ends_in_the_same_table(tmp_path: Path, data: st.DataObject) -> None:
    folder = str(tmp_path / f"{len(list(tmp_path.iterdir()))}")
    tables = [documents(7, start=5 * i) for i in range(4)]  # units overlap by two documents
    receipts = staged(folder, tables)
    kills = data.draw(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=3))
    table = create_table(folder, 16)
    for units, ledger_was_written in kills:
        commit_staged(table, folder, receipts[:units], group_rows=7)
        if units and not ledger_was_written:
            write_json(join(folder, LEDGER), {"units": units - 1})
    commit_staged(table, folder, receipts, group_rows=7)
    expected = documents(22)
    assert version_tag(table, "m") == version_tag(_fresh(folder + "-unbroken", expected), "m")
    assert sorted_columns(table, ["text"]).equals(sorted_columns_of(expected, ["text"]))


def _fresh(folder: str, rows: pa.Table):
    table = create_table(folder, 16)
    upsert(table, rows)
    return table


def sorted_columns_of(rows: pa.Table, columns: list[str]) -> pa.Table:
    return rows.sort_by("doc_id").select(columns)


def test_a_staged_file_that_differs_from_its_receipt_is_refused(tmp_path: Path) -> None:
    receipts = staged(str(tmp_path), [documents(3)])
    write_bytes(join(str(tmp_path), STAGED, "0.arrow"), arrow_bytes(documents(3, start=9)))
    with pytest.raises(DataError, match="differs from its receipt"):
        commit_staged(create_table(str(tmp_path), 16), str(tmp_path), receipts)


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from pipeline.memory.commit import create_table
from pipeline.memory.store import open_table, upsert
from tests.pipeline.memory_tables import documents
table = open_table(sys.argv[1])
for step in range(4):
    upsert(table, documents(30, start=10 * step))
"""


@pytest.mark.parametrize("writers", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_concurrent_writers_never_duplicate_a_document(tmp_path: Path, writers: int) -> None:
    table = create_table(str(tmp_path), 16)
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path), "-", root]
    running = [subprocess.Popen(command) for _ in range(writers)]
    assert [process.wait(120) for process in running] == [0] * writers
    table.checkout_latest()
    ids = sorted_columns(table, ["doc_id"])["doc_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 60


def test_columns_come_in_id_order_whatever_the_history(tmp_path: Path) -> None:
    rows = documents(30)
    one, other = create_table(str(tmp_path / "a"), 16), create_table(str(tmp_path / "b"), 16)
    upsert(one, rows)
    for start in (20, 0, 10):
        upsert(other, rows.slice(start, 10))
    compact(other, tagged=False)
    columns = ["doc_id", "text", "image_embedding"]
    assert sorted_columns(one, columns).equals(sorted_columns(other, columns))


def test_a_tagged_version_stays_as_it_was(tmp_path: Path) -> None:
    uri = str(tmp_path)
    make_memory(uri, documents(20))
    before = open_memory(uri)
    table = create_table(uri, 16)
    upsert(table, documents(10, start=20))
    compact(table, tagged=True)
    again = open_memory(uri)
    assert again.version == before.version
    assert again.num_documents == before.num_documents == 20
    assert len(again.columns_arrow(["image"])) == 20


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    make_memory(str(tmp_path), documents(20))
    memory = open_memory(str(tmp_path))
    ids = memory.columns_arrow(["doc_id"])["doc_id"].to_pylist()
    asked = [ids[7], ids[2], "absent", ids[7]]
    assert memory.rows(asked, ["text"])["doc_id"].to_pylist() == [ids[7], ids[2], ids[7]]
    assert list(memory.images(asked)) == [ids[7], ids[2]]
    assert memory.rows([], ["text"]).num_rows == 0


def test_a_second_embedding_column_rewrites_no_old_byte(tmp_path: Path) -> None:
    from pipeline.memory.columns import add_column, fill_column

    make_memory(str(tmp_path), documents(200))
    table = create_table(str(tmp_path), 16)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "lance").rglob("*.lance") if f.is_file()}
    ids = sorted_columns(table, ["doc_id"])["doc_id"].to_pylist()
    vectors = planted(200, dim=32, seed=5)
    add_column(table, "image_embedding_0123abcd", 32)
    fill_column(table, "image_embedding_0123abcd", ids[:120], vectors[:120])
    fill_column(table, "image_embedding_0123abcd", ids[120:], vectors[120:])
    files = {f for f in (tmp_path / "lance").rglob("*.lance") if f.is_file()}
    assert all(f.stat().st_mtime_ns == stamp for f, stamp in before.items())
    written = sum(f.stat().st_size for f in files - set(before))
    assert written < 200 * (32 * 2 + 24 + 60) * 2.5  # vectors, ids and an index of the ids; no pictures
    stored = sorted_columns(table, ["image_embedding_0123abcd"])["image_embedding_0123abcd"]
    assert np.allclose(np.stack(stored.to_pylist()), vectors, atol=1e-3)
    assert table.count_rows() == 200


def test_foreign_and_damaged_memories_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no certified build-index output"):
        open_memory(str(tmp_path / "nothing"))
    make_memory(str(tmp_path / "m"), documents(5))
    with pytest.raises(ConfigError, match=r"memory version 'x'.*legal: memory-"):
        open_memory(str(tmp_path / "m"), version="x")
    for manifest in (tmp_path / "m" / "lance").rglob("*.manifest"):
        manifest.write_bytes(b"not a manifest")
    with pytest.raises(ConfigError, match="can't be read") as caught:
        open_memory(str(tmp_path / "m"))
    assert "\n" not in str(caught.value)


def test_another_model_is_refused(tmp_path: Path) -> None:
    make_memory(str(tmp_path), documents(5))
    memory = open_memory(str(tmp_path))
    require_model(memory, memory.model_hash, name="planted")
    with pytest.raises(ConfigError, match="was embedded with planted"):
        require_model(memory, "other", name="ViT-B-32")


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
    config = IndexConfig.model_validate({"kind": kind, "columns": ("image_embedding",), "num_queries": 300})
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
    config = IndexConfig(kind="rq", columns=("image_embedding",), num_queries=300, num_tuning_queries=60)
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
    upsert(table, documents(3000, dim=32))
    strict = IndexConfig(kind="rq", columns=("image_embedding",), num_queries=40, recall=0.99)
    with pytest.raises(DataError, match=r"would meet it: .*num_queries of at least 449"):
        build_vector_index(table, "image_embedding", strict)
    tight = IndexConfig(kind="hnsw", columns=("image_embedding",), max_index_bytes=1000)
    with pytest.raises(DataError, match="max_index_bytes of at least"):
        build_vector_index(table, "image_embedding", tight)


def new_rows(rows: pa.Table):
    """What the committer says of documents that were added."""
    names = [name for name in rows.schema.names if name.endswith("_embedding")]
    for batch in rows.combine_chunks().to_batches():
        yield batch["doc_id"], {name: vectors_numpy(batch[name]) for name in names}


def test_small_additions_keep_the_indexes_and_are_found(tmp_path: Path) -> None:
    table = create_table(str(tmp_path), 16)
    upsert(table, documents(100))
    config = IndexConfig(num_queries=40)
    done = finish(table, config, seed=0)
    kept = {i.index_uuid for i in table.list_indices()}
    extra = documents(5, start=100, texts=[f"a zebra {i}" for i in range(5)])
    upsert(table, extra)
    save(str(tmp_path), "first", done.samples)
    growth = Growth(load(str(tmp_path), "first") or {}, lambda: new_rows(extra))
    done = finish(table, config, seed=0, before={"indexes": done.facts}, growth=growth)
    assert {i.index_uuid for i in table.list_indices()} == kept
    assert set(done.facts) == set(config.columns)
    found = table.search("zebra", query_type="fts").limit(9).select(["text", "_score"]).to_arrow()
    assert len(found) == 5
    many = documents(60, start=105)
    upsert(table, many)
    growth = Growth(done.samples, lambda: new_rows(many))
    finish(table, config, seed=0, before={"indexes": done.facts}, growth=growth)
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
    config = IndexConfig(
        kind="rq", columns=("image_embedding",), num_queries=400, num_tuning_queries=60, recall=0.95
    )
    done = finish(table, config, seed=0)
    extra = documents(30, dim=32, start=3000)
    upsert(table, extra)
    growth = Growth(done.samples, lambda: new_rows(extra))
    again = finish(table, config, seed=0, before={"indexes": done.facts}, growth=growth)
    assert "verify_s" in again.measured and "text_index_s" not in again.measured
    asked = again.facts["image_embedding"]["by_query"]["image_embedding"]
    assert asked["recall_lower_95"] >= 0.95 and asked["queries"] == 400
    assert set(again.samples["image_embedding"]["image_embedding"].own_ids) & set(extra["doc_id"].to_pylist())
    for exact in again.samples["image_embedding"].values():  # merged, not asked for; and yet the same
        setting = Setting(**again.facts["image_embedding"]["setting"])
        fresh = answered(table, "image_embedding", exact, setting, k=config.k)
        assert exact.answers is not None and fresh.answers is not None
        assert np.allclose(np.sort(exact.answers.scores), np.sort(fresh.answers.scores), atol=1e-3)
    save(str(tmp_path), "grown", again.samples)
    loaded = (load(str(tmp_path), "grown") or {})["image_embedding"]["image_embedding"]
    kept = again.samples["image_embedding"]["image_embedding"].answers
    assert loaded.answers is not None and kept is not None and loaded.answers.lists() == kept.lists()
    weak = {
        "image_embedding": done.facts["image_embedding"]
        | {"setting": {"kind": "rq", "num_bits": 1, "nprobes": 1}}
    }
    rebuilt = finish(table, config, seed=0, before={"indexes": weak}, growth=growth)
    assert "text_index_s" in rebuilt.measured


def test_vector_search_filters_before_it_searches(tmp_path: Path) -> None:
    table = create_table(str(tmp_path), 16)
    upsert(table, documents(50))
    for count in (1, 3):
        answers = vector_search(
            table, "image_embedding", planted(count, seed=3), None, k=5, where="source_name = 'films'"
        )
        assert [len(answer) for answer in answers] == [5] * count
        names = table.search().select(["doc_id", "source_name"]).to_arrow().to_pylist()
        films = {row["doc_id"] for row in names if row["source_name"] == "films"}
        assert all(doc_id in films for answer in answers for doc_id, _ in answer)


def test_vectors_survive_the_table(tmp_path: Path) -> None:
    assert np.array_equal(
        np.stack(vectors_arrow(planted(5)).to_pylist()), planted(5).astype(np.float16).astype(float)
    )
