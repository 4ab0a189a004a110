"""Laws of the memory's folder: no document twice, none lost, old versions stay, damage is told."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra.certificate import read_certificate, write_certificate
from infra.errors import ConfigError, DataError
from infra.storage import join, write_bytes
from pipeline.memory import open_memory, require_model
from pipeline.memory.build_index.shards import DROPPED, STAGED, ShardWriter, commit, create_table, deal
from pipeline.memory.search import nearest
from pipeline.memory.store import arrow_bytes, check_index, open_table
from pipeline.memory.vectors import vectors_arrow
from tests.pipeline.memory.memory_tables import documents, make_memory, planted, stage


def test_memories_on_an_object_store_are_told_apart_by_every_letter_of_their_names(s3_server: str) -> None:
    places = [f"s3://memories/waves{odd}" for odd in (" #1", " #2", "?50%25")]
    for number, place in enumerate(places):
        make_memory(place, documents(10 + number, start=100 * number))
    for number, place in enumerate(places):
        table = open_memory(place).table
        assert table.count_rows() == 10 + number
        ids = sorted(table.search().select(["doc_id"]).to_arrow()["doc_id"].to_pylist())
        assert ids == sorted(documents(10 + number, start=100 * number)["doc_id"].to_pylist())


def test_a_commit_killed_after_it_was_made_is_not_made_again(tmp_path: Path) -> None:
    out, build = str(tmp_path), str(tmp_path / "build")
    create_table(out, 16)
    write_bytes(join(build, DROPPED), np.array([3, 8], np.int64).tobytes())
    groups = deal(stage(build, documents(20), 5), 10, shards=0, documents=0)
    writer = ShardWriter(out, build, 16, "english")
    writer(groups[0].unit("shard").payload)  # killed before its receipt was written: nobody names its file
    receipts = [writer(group.unit("shard").payload) for group in groups]
    first = commit(out, receipts, first=0, version="v")
    assert commit(out, receipts, first=0, version="v") == first
    assert [(shard.first, shard.rows) for shard in first] == [(0, 8), (8, 10)]
    table = open_table(out)
    assert table is not None and table.count_rows() == 18
    assert len(list((tmp_path / "lance" / "documents.lance" / "data").iterdir())) == 2
    kept = [n for n in range(20) if n not in (3, 8)]
    ids = table.search().select(["doc_id"]).limit(None).to_arrow()["doc_id"].to_pylist()
    assert ids == documents(20).take(pa.array(kept))["doc_id"].to_pylist()


def test_a_staged_file_that_differs_from_its_receipt_is_refused(tmp_path: Path) -> None:
    out, build = str(tmp_path), str(tmp_path / "build")
    create_table(out, 16)
    write_bytes(join(build, DROPPED), b"")
    [group] = deal(receipts := stage(build, documents(3), 3), 10, shards=0, documents=0)
    write_bytes(join(build, STAGED, receipts[0]["file"]), arrow_bytes(documents(3, start=9)))
    with pytest.raises(DataError, match="differs from its receipt"):
        ShardWriter(out, build, 16, "english")(group.unit("shard").payload)


def test_the_cut_into_shards_changes_no_version_and_no_sample(tmp_path: Path) -> None:
    found = []
    for shard_rows in (40, 7, 1):
        make_memory(str(tmp_path / str(shard_rows)), documents(40), shard_rows=shard_rows)
        memory = open_memory(str(tmp_path / str(shard_rows)))
        assert len(memory.shards) == -(-40 // shard_rows)
        statistics = memory.statistics
        words = [statistics.hashes.tolist(), statistics.counts.tolist(), statistics.mean_length]
        found.append((memory.version, memory.sample.to_pylist(), words))
    assert found[0] == found[1] == found[2]


def test_words_analysed_otherwise_are_another_version(tmp_path: Path) -> None:
    rows = documents(6)
    for analysis in ("english", "none"):
        make_memory(str(tmp_path / analysis), rows, analysis=analysis)
    assert open_memory(str(tmp_path / "english")).version != open_memory(str(tmp_path / "none")).version


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    rows = documents(20)
    make_memory(str(tmp_path), rows, shard_rows=6)
    memory, ids = open_memory(str(tmp_path)), rows["doc_id"].to_pylist()
    asked = [ids[7], ids[2], "absent", ids[7]]
    assert memory.rows(asked, ["text"])["doc_id"].to_pylist() == [ids[7], ids[2], ids[7]]
    assert memory.rows([], ["text"]).num_rows == 0
    assert memory.take([19, 2, 7, 2], ["doc_id"])["doc_id"].to_pylist() == [ids[n] for n in (19, 2, 7, 2)]
    assert memory.take([], ["doc_id"]).num_rows == 0


def test_foreign_and_damaged_memories_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no certified build-index output"):
        open_memory(str(tmp_path / "nothing"))
    place = tmp_path / "m"
    make_memory(str(place), documents(5), shard_rows=2, unit_rows=2)
    with pytest.raises(ConfigError, match=r"memory version 'x'.*legal: memory-"):
        open_memory(str(place), version="x")
    certificate = read_certificate(place)
    assert certificate is not None
    for file in (place / "shards" / "00001").glob("*.arrow"):
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        with pytest.raises(
            DataError, match=f"00001/{file.name} of .* is missing or cut short; cure: restore it"
        ):
            open_memory(str(place), read_through=False)
        file.write_bytes(data)
    (place / "shards" / "00001" / "certificate.json").unlink()
    with pytest.raises(DataError, match=r"00001/certificate.json is missing; cure: restore it"):
        open_memory(str(place))
    facts = {name: value for name, value in certificate.facts.items() if name != "shards"}
    write_certificate(place, certificate.model_copy(update={"facts": facts}))
    with pytest.raises(ConfigError, match="a memory of an older layout, without shards; cure: build it again"):
        open_memory(str(place))
    make_memory(str(tmp_path / "n"), documents(5))
    for manifest in (tmp_path / "n" / "lance").rglob("*.manifest"):
        manifest.write_bytes(b"not a manifest")
    with pytest.raises(DataError, match=r"manifest is not the file that was certified") as caught:
        open_memory(str(tmp_path / "n"))
    assert "\n" not in str(caught.value)


def test_an_index_is_read_through_by_the_job_and_not_again_by_each_worker(tmp_path: Path) -> None:
    make_memory(str(tmp_path), documents(5))
    memory = open_memory(str(tmp_path), read_through=False)
    check_index(memory)
    (file,) = (tmp_path / "lance").rglob("page_lookup.lance")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert open_memory(str(tmp_path), read_through=False).num_documents == 5
    for refuse in (lambda: check_index(memory), lambda: open_memory(str(tmp_path))):
        with pytest.raises(DataError, match=r"page_lookup.lance is not the file that was certified"):
            refuse()


def test_another_model_is_refused(tmp_path: Path) -> None:
    make_memory(str(tmp_path), documents(5))
    memory = open_memory(str(tmp_path))
    require_model(memory, memory.model_hash, name="planted")
    with pytest.raises(ConfigError, match=r"was embedded with offline \(planted\), not with ViT-B-32"):
        require_model(memory, "other", name="ViT-B-32")


def test_vector_search_filters_before_it_searches(tmp_path: Path) -> None:
    make_memory(str(tmp_path), documents(50), shard_rows=20)
    memory = open_memory(str(tmp_path))
    for count in (1, 3):
        where, queries = "source_name = 'films'", planted(count, seed=3)
        answers = nearest(memory, memory.table, "image_embedding", queries, 5, where=where)
        assert [len(hits) for hits in answers] == [5] * count
        assert all(number % 2 for hits in answers for number in hits.docs)  # as `documents` makes them


def test_vectors_survive_the_table() -> None:
    assert np.array_equal(
        np.stack(vectors_arrow(planted(5)).to_pylist()), planted(5).astype(np.float16).astype(float)
    )
