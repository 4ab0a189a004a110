"""Laws of the embedding worker: every row keeps its fate, and a slice gives the same documents anywhere."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.clip import Clip, ClipConfig, load_clip
from pipeline.memory.embed import pictures
from pipeline.memory.embed.streams import Streams, ahead, batches
from pipeline.memory.embed.worker import Embedder
from pipeline.memory.vectors import document_vector, frame_mean, unit
from pipeline.schema import Status
from pipeline.shards import read_slice
from tests.pipeline.clip_tables import clip_row, picture, write_clips


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(ClipConfig(name="offline"), batch_size=4)


def run(folder: Path, rows: list[dict], clip: Clip, *, key_frames: int = 4) -> tuple[dict, pa.Table]:
    uri = write_clips(folder / "clips", rows)
    embedder = Embedder(clip=ClipConfig(name="offline"), staged=str(folder / "staged"), key_frames=key_frames)
    payload = {"uri": f"{uri}/part-00000.parquet", "start": 0, "rows": len(rows)}
    receipt = embedder.run(payload, clip, Streams.make("cpu", 2))
    if receipt["file"] is None:
        return receipt, pa.table({})
    return receipt, pa.ipc.open_file(str(folder / "staged" / receipt["file"])).read_all()


def png_bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_every_bad_row_keeps_its_fate_and_no_good_row_is_lost(tmp_path: Path, clip: Clip) -> None:
    good = [picture(tmp_path / f"{n}.png", n) for n in range(5)]
    bad = {
        "bomb.png": png_bomb(),
        "torn.jpg": b"\xff\xd8\xff\xe0 torn",
        "empty.png": b"",
        "page.png": b"<html>",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    Image.new("RGB", (900, 20)).save(tmp_path / "ribbon.png")
    (tmp_path / "torn.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 64)
    rows = [
        clip_row(good[0], "a red wave"),
        clip_row(tmp_path / "bomb.png", "a bomb"),
        clip_row(tmp_path / "torn.jpg", "torn"),
        clip_row(tmp_path / "empty.png", "empty"),
        clip_row(tmp_path / "page.png", "a page"),
        clip_row(good[1], "   "),
        clip_row(good[1], None),
        clip_row(good[1], "long " * 20_000),
        clip_row(tmp_path / "ribbon.png", "a ribbon"),
        clip_row(tmp_path / "absent.png", "absent"),
        clip_row(tmp_path / "torn.mp4", "a torn film", media="video", end_s=2.0),
        clip_row(good[2], "unreachable upstream", status=Status.TIMEOUT),
        clip_row(good[3], "a blue wave"),
        clip_row(good[3], "a blue wave"),
        clip_row(good[3], "word " * 1999),  # a crawl keeps it
        clip_row(good[4], "naïve 北京 🐈"),
    ]
    receipt, documents = run(tmp_path, rows, clip)
    long = ("word " * 1999).strip()
    assert documents["text"].to_pylist() == ["a red wave", "a blue wave", long, "naïve 北京 🐈"]
    assert (
        receipt["documents"] + sum(receipt["fates"].values()) == receipt["rows"] == len(rows) - 1
    )  # a crawl's
    assert receipt["fates"] == {
        "bad_caption": 1,
        "empty": 1,
        "filtered_aspect": 1,
        "filtered_duplicate": 1,
        "filtered_no_caption": 2,
        "not_found": 1,
        "too_large": 1,
        "undecodable": 3,
    }
    assert receipt["notes"] == {"ok": 4, **receipt["fates"]}  # statuses: labels of the metric of rows
    reasons = {rejected[1].rsplit("/")[-1]: rejected[2] for rejected in receipt["rejected"]}
    assert reasons["bomb.png"] == "too_large" and reasons["torn.mp4"] == "undecodable"


def test_vectors_are_unit_and_pictures_are_bounded(
    tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "IMAGE_MAX_PX", 128)
    rows = [clip_row(picture(tmp_path / f"{n}.png", n, size_px=(600, 800)), f"wave {n}") for n in range(6)]
    _, documents = run(tmp_path, rows, clip)
    for name in ("image_embedding", "text_embedding", "document_embedding"):
        vectors = np.stack(documents[name].to_pylist())
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    sizes = [Image.open(io.BytesIO(data)).size for data in documents["image"].to_pylist()]
    assert sizes == [(128, 96)] * 6
    image, text = (np.stack(documents[f"{n}_embedding"].to_pylist()) for n in ("image", "text"))
    together = np.stack(documents["document_embedding"].to_pylist())
    assert np.allclose(together, document_vector(image, text), atol=2e-3)


def test_stored_vectors_are_those_of_the_bare_model(tmp_path: Path, clip: Clip) -> None:
    files = [picture(tmp_path / f"{n}.png", n) for n in range(3)]
    _, documents = run(tmp_path, [clip_row(file, f"wave {n}") for n, file in enumerate(files)], clip)
    expected = clip.encode_images([Image.open(file).convert("RGB") for file in files])
    assert np.allclose(np.stack(documents["image_embedding"].to_pylist()), expected, atol=2e-3)


def test_key_frames_are_averaged_and_the_middle_one_is_the_picture(
    tmp_path: Path, clip: Clip, write_video
) -> None:
    from pipeline.media.frames import clip_times, decode_frames

    film = write_video(tmp_path / "film.mp4", num_frames=40)
    row = clip_row(film, "a film", media="video", end_s=1.2)
    receipt, documents = run(tmp_path, [row], clip, key_frames=3)
    assert receipt["documents"] == 1
    frames = decode_frames(str(film), clip_times(0.0, 1.2, 3))
    expected = frame_mean(clip.encode_images(list(frames)), [3])
    assert np.allclose(np.stack(documents["image_embedding"].to_pylist()), expected, atol=3e-3)
    shown = np.asarray(Image.open(io.BytesIO(documents["image"][0].as_py())), np.float32)
    assert np.abs(shown - frames[1]).mean() < np.abs(shown - frames[0]).mean()


def test_the_same_slice_gives_the_same_bytes(tmp_path: Path, clip: Clip) -> None:
    rows = [clip_row(picture(tmp_path / f"{n}.png", n), f"wave {n}") for n in range(5)]
    one, _ = run(tmp_path / "a", rows, clip)
    other, _ = run(tmp_path / "b", rows, clip)
    assert one == other


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 25), st.data())
def test_a_slice_is_what_the_whole_table_holds_there(count: int, group: int, data: st.DataObject) -> None:
    import tempfile

    table = pa.table({"a": range(count), "b": [str(n) for n in range(count)]})
    start = data.draw(st.integers(0, count - 1))
    rows = data.draw(st.integers(1, count - start))
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, f"{folder}/t.parquet", row_group_size=group)
        assert read_slice(f"{folder}/t.parquet", start, rows, ["a"]).equals(
            table.select(["a"]).slice(start, rows)
        )


@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(0, 1000))
def test_frame_mean_is_normalise_mean_normalise(counts: list[int], seed: int) -> None:
    frames = np.random.default_rng(seed).normal(size=(sum(counts), 6)).astype(np.float32)
    found, start = frame_mean(frames, counts), 0
    for row, count in zip(found, counts, strict=True):
        expected = unit(unit(frames[start : start + count]).mean(axis=0, keepdims=True))[0]
        assert np.allclose(row, expected, atol=1e-5)
        start += count


@given(st.lists(st.integers()), st.integers(0, 5), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_ahead_keeps_order_and_batches_lose_nothing(items: list[int], depth: int, size: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(ahead(pool, lambda x: x + 1, items, depth=depth))
    assert found == [x + 1 for x in items]
    assert [x for batch in batches(iter(items), size) for x in batch] == items
