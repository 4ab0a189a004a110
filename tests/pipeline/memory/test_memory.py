"""Laws of the memory's table: no document twice, none lost, old versions stay."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.certificate import write_sealed
from infra.errors import ConfigError, DataError
from infra.storage import join, write_bytes
from pipeline.memory import open_memory, require_model
from pipeline.memory.commit import LEDGER, STAGED, commit_staged, create_table
from pipeline.memory.embed.worker import arrow_bytes
from pipeline.memory.index import compact
from pipeline.memory.store import sorted_columns, upsert, vectors_arrow, version_tag
from pipeline.memory.vectors import vector_search
from tests.pipeline.memory.memory_tables import documents, make_memory, planted


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


def test_memories_on_an_object_store_are_told_apart_by_every_letter_of_their_names(s3_server: str) -> None:
    write_bytes("s3://memories/marker", b"")  # makes the bucket
    places = [f"s3://memories/waves{odd}" for odd in (" #1", " #2", "?50%25")]
    for number, place in enumerate(places):
        make_memory(place, documents(10 + number, start=100 * number))
    for number, place in enumerate(places):
        table = open_memory(place).table
        assert table.count_rows() == 10 + number
        ids = sorted_columns(table, ["doc_id"])["doc_id"].to_pylist()
        assert ids == sorted(documents(10 + number, start=100 * number)["doc_id"].to_pylist())


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
            write_sealed(join(folder, LEDGER), {"units": units - 1})
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
from tests.pipeline.memory.memory_tables import documents
table = open_table(sys.argv[1])
for step in range(4):
    upsert(table, documents(30, start=10 * step))
"""


@pytest.mark.parametrize("writers", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_concurrent_writers_never_duplicate_a_document(tmp_path: Path, writers: int) -> None:
    table = create_table(str(tmp_path), 16)
    root = str(Path(__file__).resolve().parents[3])
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
    from pipeline.memory.build_index.add_clip import add_column, fill_columns

    make_memory(str(tmp_path), documents(200))
    table = create_table(str(tmp_path), 16)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "lance").rglob("*.lance") if f.is_file()}
    ids = sorted_columns(table, ["doc_id"])["doc_id"].to_pylist()
    vectors = planted(200, dim=32, seed=5)
    add_column(table, "image_embedding_0123abcd", 32)
    for part in (slice(0, 120), slice(120, 200)):
        new = {"doc_id": ids[part], "image_embedding_0123abcd": vectors_arrow(vectors[part])}
        fill_columns(table, pa.table(new))
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
    with pytest.raises(DataError, match=r"manifest is not the file that was certified") as caught:
        open_memory(str(tmp_path / "m"))
    assert "\n" not in str(caught.value)


def test_another_model_is_refused(tmp_path: Path) -> None:
    make_memory(str(tmp_path), documents(5))
    memory = open_memory(str(tmp_path))
    require_model(memory, memory.model_hash, name="planted")
    with pytest.raises(ConfigError, match="was embedded with planted"):
        require_model(memory, "other", name="ViT-B-32")


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
