"""Laws of deduplication: groups are connected components, one of each stays, reasons add up."""

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.errors import DataError
from pipeline.media.phash import phash64
from pipeline.memory.build_index import duplicates
from pipeline.memory.build_index.duplicates import (
    DedupConfig,
    Documents,
    Duplicates,
    KeyWriter,
    PairFinder,
    band,
    calibrate,
    components,
    group,
    key_units,
    num_bands,
    pair_units,
)
from pipeline.memory.build_index.shards import deal
from pipeline.memory.store import open_memory, read_table
from pipeline.memory.vectors import unit, vectors_arrow
from pipeline.schema import Status
from tests.pipeline.clip_tables import picture
from tests.pipeline.memory.memory_tables import documents, make_memory, stage


def with_images(rows: pa.Table, vectors: np.ndarray) -> pa.Table:
    place = rows.schema.get_field_index("image_embedding")
    return rows.set_column(place, rows.schema.field(place), vectors_arrow(vectors))


def chain(count: int, step_rad: float, dim: int = 16) -> np.ndarray:
    """Unit vectors on a circle, each `step_rad` from the next."""
    angles = np.arange(count) * step_rad
    vectors = np.zeros((count, dim))
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    return vectors


def find(
    folder: Path, rows: pa.Table, config: DedupConfig = DedupConfig(), *, old: int = 0, group_rows: int = 50
) -> Duplicates:
    """The duplicates of these documents, the first `old` of which are a memory already."""
    out, build = str(folder), str(folder / "new")
    version = None
    if old:
        make_memory(out, rows.slice(0, old), shard_rows=group_rows)
        version = open_memory(out).version
    shards = open_memory(out).shards if old else ()
    groups = deal(stage(build, rows.slice(old), 5), group_rows, shards=len(shards), documents=old)
    there = Documents(out, build, version, old)
    there.write(groups)
    units, bands = key_units(groups, shards), num_bands(len(rows), config.max_phash_bits)
    keys = [KeyWriter(out, build, bands, len(units))(unit.payload) for unit in units]
    bound = calibrate(config, there, keys)
    finder = PairFinder(there, bands, config.max_phash_bits, bound, True)
    found = [finder(unit.payload) for unit in pair_units(keys, len(units))]
    return group([read_table(f"{build}/pairs/{r['file']}") for r in found if r["file"]], old)


def replaced(rows: pa.Table, **columns: list) -> pa.Table:
    for name, values in columns.items():
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(place), pa.array(values, rows.schema.field(place).type))
    return rows


def pairs(found: Duplicates) -> set[frozenset[str]]:
    return {
        frozenset(pair) for pair in zip(*(found.table[c].to_pylist() for c in ("doc_id", "kept")), strict=True)
    }


def test_a_chain_of_neighbours_is_one_group(tmp_path: Path) -> None:
    step = np.arccos(0.95)
    vectors = np.concatenate([chain(5, step), chain(3, np.pi / 2)[1:] + np.eye(16)[5]])
    rows = with_images(documents(7), unit(vectors))
    found = find(tmp_path, rows).table
    names = dict(zip(rows["doc_id"].to_pylist(), rows["source_uri"].to_pylist(), strict=True))
    assert len(found) == 4 and len(set(found["kept"].to_pylist())) == 1
    members = {names[d] for d in [*found["doc_id"].to_pylist(), found["kept"][0].as_py()]}
    assert members == {f"/corpus/{n}.png" for n in range(5)}
    assert set(found["reason"].to_pylist()) == {Status.FILTERED_NEAR_DUPLICATE}


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
def test_components_are_what_a_walk_along_the_edges_reaches(count: int, edges: list[tuple[int, int]]) -> None:
    one, other = np.array([(a % count, b % count) for a, b in edges], np.int64).reshape(-1, 2).T
    labels = components(one, other, count)
    for start in range(count):
        reached, left = {start}, [start]
        while left:
            at = left.pop()
            for a, b in [*zip(one, other, strict=True), *zip(other, one, strict=True)]:
                if a == at and b not in reached:
                    reached.add(int(b))
                    left.append(int(b))
        assert np.flatnonzero(labels == labels[start]).tolist() == sorted(reached)
        assert labels[start] == min(reached)


def test_many_pairs_in_a_row_are_grouped_in_arrays_not_in_objects() -> None:
    """The driver's memory beside Arrow's: a pair as Python objects took about a kilobyte."""
    count = 200_000
    places = np.random.default_rng(0).permutation(count + 1)
    ids = pa.array([f"{place:016x}" for place in places])
    table = pa.table({"kind": np.full(count, 2), "cosine": np.full(count, 0.97, np.float32)})
    for side, at in (("one", 0), ("other", 1)):
        part = slice(at, at + count)
        columns = [places[part], ids.slice(at, count), np.zeros(count, int), np.full(count, 9)]
        for name, values in zip(("", "_doc_id", "_same", "_area"), columns, strict=True):
            table = table.append_column(side + name, pa.array(values))
    tracemalloc.start()
    found = group([table], 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(found.table["kept"].to_pylist()) == {f"{0:016x}"} and len(found.table) == count
    assert found.places.tolist() == list(range(1, count + 1))
    assert most < 300 * count


def test_the_same_piece_with_the_same_words_is_an_exact_duplicate(tmp_path: Path) -> None:
    rows = documents(3, texts=["A  red ball", "a red BALL", "a blue ball"])
    rows = replaced(rows, source_sha256=["x", "x", "x"], width_px=[10, 20, 10])
    found = find(tmp_path, with_images(rows, np.eye(16)[:3]))
    assert found.counts == {"filtered_duplicate": 1} and found.places.tolist() == [0]
    assert (
        found.table["kept"][0].as_py() == rows["doc_id"][1].as_py()
    )  # the larger picture stands for the group


def test_a_document_that_is_staged_twice_is_taken_once_and_is_no_pair(tmp_path: Path) -> None:
    rows = documents(12)
    found = find(tmp_path, pa.concat_tables([rows, rows.slice(3, 2)]), group_rows=5)
    assert found.copies.tolist() == [12, 13] and len(found.table) == 0


def test_a_key_writer_keeps_no_pictures(tmp_path: Path) -> None:
    """Arrow's selections are views, each of which would keep its whole file."""
    rows, build = documents(60), str(tmp_path / "new")
    rows = replaced(rows, image=[np.random.default_rng(n).bytes(100_000) for n in range(60)])
    groups = deal(stage(build, rows, 10), 60, shards=0, documents=0)
    (unit_,) = key_units(groups, [])
    worker = KeyWriter(str(tmp_path), build, 4, 1)
    tracemalloc.start()
    found = worker._rows(unit_.payload)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 60 and kept < 300_000 < 1_000_000 < most < 4_000_000


def test_a_memory_with_a_damaged_shard_does_not_grow(tmp_path: Path) -> None:
    make_memory(str(tmp_path), documents(10), shard_rows=50)
    file = next(tmp_path.glob("shards/*/documents.arrow"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (unit_,) = key_units([], open_memory(str(tmp_path), read_through=False).shards)
    with pytest.raises(DataError, match=r"documents\.arrow"):
        KeyWriter(str(tmp_path), str(tmp_path / "new"), 4, 1)(unit_.payload)


def test_perceptual_hashes_can_veto(tmp_path: Path) -> None:
    rows = with_images(documents(4), np.tile(np.eye(16)[:1], (4, 1)))  # phash 0, 1, 2, 3
    assert len(find(tmp_path / "a", rows).table) == 3
    assert len(find(tmp_path / "b", rows, DedupConfig(max_phash_bits=0)).table) == 0


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), new=st.integers(1, 11), group_rows=st.sampled_from([1, 4, 50]))
def test_a_grown_memory_keeps_what_it_has_and_finds_the_pairs_of_its_new_documents(
    tmp_path: Path, seed: int, new: int, group_rows: int
) -> None:
    random = np.random.default_rng(seed)
    vectors = unit(np.eye(16)[random.integers(0, 6, 12)] + 0.01 * random.normal(size=(12, 16)))
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    rows = with_images(documents(12), vectors)
    ids = rows["doc_id"].to_pylist()
    found = find(folder, rows, old=12 - new, group_rows=group_rows)
    assert set(found.table["doc_id"].to_pylist()) <= set(ids[-new:])
    touched = set().union(*pairs(found))
    for i in range(12 - new, 12):
        alone = all(vectors[i] @ vectors[j] < 0.94 for j in range(12) if j != i)
        assert (ids[i] in touched) != alone


@settings(max_examples=30, deadline=None)
@given(
    count=st.sampled_from([100, 10**5, 10**6, 10**7, 10**9]), bits=st.integers(0, 11), seed=st.integers(0, 999)
)
def test_hashes_that_differ_in_fewer_bits_than_bands_share_one(count: int, bits: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    bands = num_bands(count, bits)
    assert min(4, bits + 1) <= bands <= bits + 1 and (count > 10**5 or bands == bits + 1)
    flips = sum(1 << int(bit) for bit in random.choice(64, bands - 1, replace=False))
    one = random.integers(0, 2**63, 1).astype(np.uint64)
    other = one ^ np.uint64(flips)
    assert any(band(one, n, bands) == band(other, n, bands) for n in range(bands))
    whole = [int(band(one, n, bands)[0]) << (64 * n // bands) for n in range(bands)]
    assert sum(whole) == int(one[0])


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
    rows = replaced(with_images(documents(170), unit(vectors)), phash=hashes)
    strangers = unit(vectors[:150]) @ unit(vectors[:150]).T
    assert np.mean(strangers > 0.94) > 0.5
    ids = rows["doc_id"].to_pylist()
    for most in (duplicates.MAX_COMPARED, 0):  # all bands, and as few as a huge memory has
        monkeypatch.setattr(duplicates, "MAX_COMPARED", most)
        found = find(tmp_path / f"most-{most}", rows, group_rows=60)
        assert pairs(found) == {frozenset((ids[n], ids[150 + n])) for n in range(20)}


def test_black_frames_are_one_group_and_cost_no_square(tmp_path: Path) -> None:
    rows = with_images(documents(400), np.tile(np.eye(16)[:1], (400, 1)))
    rows = replaced(rows, phash=[0] * 300 + [2**40 * n for n in range(1, 101)])
    found = find(tmp_path, rows, DedupConfig(max_phash_bits=0), group_rows=90)
    assert len(found.table) == 299
