"""Laws of deduplication: groups are connected components, one of each stays, reasons add up."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.media.phash import phash64
from pipeline.memory import duplicates, near_duplicates
from pipeline.memory.commit import create_table
from pipeline.memory.duplicates import drop, find_duplicates
from pipeline.memory.near_duplicates import DedupConfig
from pipeline.memory.store import sorted_columns, upsert, vectors_arrow
from pipeline.memory.vectors import unit
from pipeline.schema import Status
from tests.pipeline.clip_tables import picture
from tests.pipeline.memory.memory_tables import documents


def with_images(rows: pa.Table, vectors: np.ndarray) -> pa.Table:
    place = rows.schema.get_field_index("image_embedding")
    return rows.set_column(place, rows.schema.field(place), vectors_arrow(vectors))


def chain(count: int, step_rad: float, dim: int = 16) -> np.ndarray:
    """Unit vectors on a circle, each `step_rad` from the next."""
    angles = np.arange(count) * step_rad
    vectors = np.zeros((count, dim))
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    return vectors


def test_a_chain_of_neighbours_is_one_group(tmp_path: Path) -> None:
    step = np.arccos(0.95)
    vectors = np.concatenate([chain(5, step), chain(3, np.pi / 2)[1:] + np.eye(16)[5]])
    table = create_table(str(tmp_path), 16)
    upsert(table, with_images(documents(7), unit(vectors)))
    found = find_duplicates(table, DedupConfig()).table
    rows = sorted_columns(table, ["doc_id", "source_uri"]).to_pylist()
    names = {row["doc_id"]: row["source_uri"] for row in rows}
    assert len(found) == 4 and len(set(found["kept"].to_pylist())) == 1
    members = {names[d] for d in [*found["doc_id"].to_pylist(), found["kept"][0].as_py()]}
    assert members == {f"/corpus/{n}.png" for n in range(5)}
    assert set(found["reason"].to_pylist()) == {Status.FILTERED_NEAR_DUPLICATE}


def test_the_same_piece_with_the_same_words_is_an_exact_duplicate(tmp_path: Path) -> None:
    rows = documents(3, texts=["A  red ball", "a red BALL", "a blue ball"])
    for column, values in (("source_sha256", ["x", "x", "x"]), ("width_px", [10, 20, 10])):
        place = rows.schema.get_field_index(column)
        rows = rows.set_column(place, rows.schema.field(place), pa.array(values, rows.schema.field(place).type))
    table = create_table(str(tmp_path), 16)
    upsert(table, with_images(rows, np.eye(16)[:3]))
    found = find_duplicates(table, DedupConfig())
    assert found.counts == {"filtered_duplicate": 1}
    kept = table.search().where(f"doc_id = '{found.table['kept'][0].as_py()}'").to_arrow()
    assert kept["width_px"].to_pylist() == [20]  # the larger picture stands for the group
    drop(table, found)
    drop(table, found)
    assert table.count_rows() == 2


def test_perceptual_hashes_can_veto(tmp_path: Path) -> None:
    table = create_table(str(tmp_path), 16)
    upsert(table, with_images(documents(4), np.tile(np.eye(16)[:1], (4, 1))))  # phash 0, 1, 2, 3
    assert len(find_duplicates(table, DedupConfig()).table) == 3
    assert len(find_duplicates(table, DedupConfig(max_phash_bits=0)).table) == 0


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), new=st.integers(1, 11))
def test_a_grown_memory_finds_the_pairs_of_its_new_documents(tmp_path: Path, seed: int, new: int) -> None:
    random = np.random.default_rng(seed)
    vectors = unit(np.eye(16)[random.integers(0, 6, 12)] + 0.01 * random.normal(size=(12, 16)))
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    table = create_table(str(folder), 16)
    rows = with_images(documents(12), vectors)
    upsert(table, rows)
    ids = rows["doc_id"].to_pylist()
    everything = find_duplicates(table, DedupConfig(), new=ids)
    assert everything.table.equals(find_duplicates(table, DedupConfig()).table)
    some = find_duplicates(table, DedupConfig(), new=ids[-new:]).table
    touched = {*some["doc_id"].to_pylist(), *some["kept"].to_pylist()}
    for i in range(12 - new, 12):
        alone = all(vectors[i] @ vectors[j] < 0.94 for j in range(12) if j != i)
        assert (ids[i] in touched) != alone


def test_a_large_table_is_compared_through_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = documents(600)
    place = rows.schema.get_field_index("image_embedding")
    vectors = np.stack(rows.column(place).to_pylist())
    vectors[300:310] = vectors[:10]
    table = create_table(str(tmp_path), 16)
    upsert(table, with_images(rows, unit(vectors)))
    exact = find_duplicates(table, DedupConfig(min_cosine=0.995))
    monkeypatch.setattr(duplicates, "EXACT_ROWS", 0)
    indexed = find_duplicates(table, DedupConfig(min_cosine=0.995))
    assert len(exact.table) >= 10
    assert indexed.table["doc_id"].equals(exact.table["doc_id"])


def re_encoded(path: Path, *, quality: int, scale: float) -> bytes:
    image = Image.open(path).convert("RGB")
    size = (int(image.width * scale), int(image.height * scale))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_distinct_pictures_stay_and_re_encoded_ones_are_found_at_a_weak_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of random waves, whose vectors are all alike (cosines above 0.94), as a weak encoder's."""
    files = [picture(tmp_path / f"{n}.png", n, size_px=(120, 160)) for n in range(150)]
    data = [file.read_bytes() for file in files]
    data += [re_encoded(file, quality=40, scale=0.5) for file in files[:20]]
    hashes = [phash64(np.asarray(Image.open(io.BytesIO(some)).convert("RGB"))) for some in data]
    random = np.random.default_rng(0)
    vectors = np.eye(16)[0] + 0.05 * random.normal(size=(170, 16))
    vectors[150:] = vectors[:20] + 0.02 * random.normal(size=(20, 16))
    rows = with_images(documents(170), unit(vectors))
    place = rows.schema.get_field_index("phash")
    rows = rows.set_column(place, rows.schema.field(place), pa.array(hashes, pa.uint64()))
    table = create_table(str(tmp_path / "m"), 16)
    upsert(table, rows)
    strangers = unit(vectors[:150]) @ unit(vectors[:150]).T
    assert np.mean(strangers > 0.94) > 0.5
    monkeypatch.setattr(near_duplicates, "NEIGHBOURS", 170)
    for exact_rows in (duplicates.EXACT_ROWS, 0):
        monkeypatch.setattr(duplicates, "EXACT_ROWS", exact_rows)
        found = find_duplicates(table, DedupConfig()).table
        pairs = {
            frozenset(pair) for pair in zip(*(found[c].to_pylist() for c in ("doc_id", "kept")), strict=True)
        }
        ids = rows["doc_id"].to_pylist()
        assert pairs == {frozenset((ids[n], ids[150 + n])) for n in range(20)}


def test_black_frames_are_one_group_and_cost_no_square(tmp_path: Path) -> None:
    rows = with_images(documents(400), np.tile(np.eye(16)[:1], (400, 1)))
    place = rows.schema.get_field_index("phash")
    hashes = pa.array([0] * 300 + [2**40 * n for n in range(1, 101)], pa.uint64())
    table = create_table(str(tmp_path), 16)
    upsert(table, rows.set_column(place, rows.schema.field(place), hashes))
    found = find_duplicates(table, DedupConfig(max_phash_bits=0))
    assert len(found.table) == 299 and found.min_cosine == 0.94
