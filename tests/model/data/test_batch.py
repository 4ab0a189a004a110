"""Laws of decoding rows into batches."""

import io

import numpy as np
import pytest
from PIL import Image

from infra.errors import ConfigError, DataError
from infra.pictures import ORIENTATION
from model.data.batch import check_schema, collate, read_prompt
from model.data.buckets import Bucket, streams_of
from model.data.sample import choose_frames, decode_video, fit_frames, read_sample
from pipeline.schema import PROMPTS
from tests.model.prompt_tables import mp4

VIDEO = Bucket("video", 8, 24, 40)


def sample_of(row, bucket=VIDEO):
    return read_sample(row, bucket, position=0, prompt=read_prompt(row))


def test_frames_of_the_right_size_come_through_unchanged(make_row) -> None:
    row = make_row(5)
    expected = np.frombuffer(row["target"]["data"], np.uint8).reshape(8, 24, 40, 3)
    sample = sample_of(row)
    assert (sample.video.permute(0, 2, 3, 1).numpy() == expected).all()
    assert sample.fps == 8.0 and sample.original_size_px == (24, 40)


def test_mp4_and_reference_show_the_same_as_frames(make_row, tmp_path) -> None:
    frames, video = make_row(2), make_row(2, kind="video")
    reference = make_row(2, kind="reference")
    path = tmp_path / "clip.mp4"
    path.write_bytes(video["target"]["data"])
    reference["source_uri"] = str(path)
    exact = sample_of(frames).video.float()
    for row in (video, reference):
        sample = sample_of(row)
        assert sample.video.shape == (8, 3, 24, 40)
        assert (sample.video.float() - exact).abs().mean() < 4
        assert sample.fps == pytest.approx(8.0, rel=0.01)


def test_range_of_a_reference_is_kept(make_row, tmp_path) -> None:
    long = make_row(1, kind="video", num_frames=32)
    path = tmp_path / "clip.mp4"
    path.write_bytes(long["target"]["data"])
    row = make_row(1, kind="reference") | {"source_uri": str(path), "start_s": 1.0, "end_s": 2.0}
    whole = make_row(1, num_frames=32)
    expected = np.frombuffer(whole["target"]["data"], np.uint8).reshape(32, 24, 40, 3)[8:16]
    found = sample_of(row).video.permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - expected.astype(int)).mean() < 4


def test_a_bucket_with_a_rate_takes_frames_at_it_from_the_clips_start(tmp_path) -> None:
    """Frame n of the film is grey of level 6 n; it has 40 at 20 a second."""
    film = np.broadcast_to((6 * np.arange(40, dtype=np.uint8))[:, None, None, None], (40, 24, 40, 3))
    data = mp4(np.ascontiguousarray(film), fps=20)

    def shown(num_frames: int, fps: float | None, **span: tuple[float, float]) -> tuple[list[int], float]:
        frames, rate = decode_video(io.BytesIO(data), num_frames, fps=fps, **span)
        return [round(float(frame.mean()) / 6) for frame in frames], round(rate, 3)

    assert shown(4, 10) == ([0, 2, 4, 6], 10)
    assert shown(4, 10, span_s=(0.5, 1.5)) == ([10, 12, 14, 16], 10)
    assert shown(5, 16) == ([0, 1, 2, 4, 5], 16)  # nearest frames
    assert shown(4, 60) == ([0, 1, 2, 3], 20)  # the film is slower
    assert shown(20, 10) == ([*range(0, 40, 2)], 10)
    assert shown(5, 1) == shown(5, None) == ([0, 10, 20, 29, 39], 2.051)  # too short
    assert shown(10, 10, span_s=(1.5, 2.0))[0] == [*range(30, 40)]  # too short again: all of it


@pytest.mark.parametrize("fps", [None, 4.0])
@pytest.mark.parametrize("times_s", [[0.0], [1.5, 1.5, 1.5], [2.0, 1.0]])
def test_frames_whose_times_say_nothing_are_spread_at_one_a_second(
    times_s: list[float], fps: float | None
) -> None:
    keep, rate = choose_frames(np.array(times_s), 5, fps)
    assert keep.tolist() == np.linspace(0, len(times_s) - 1, 5).round().tolist() and 0 < rate < 10


def test_fewer_frames_play_slower(make_row) -> None:
    sample = sample_of(make_row(0, num_frames=15))
    assert sample.video.shape[0] == 8 and sample.fps == pytest.approx(4.0)


def test_picture_is_one_frame_of_infinite_rate(make_row) -> None:
    sample = sample_of(make_row(0, media="image"), Bucket("image", 1, 24, 40))
    assert sample.video.shape == (1, 3, 24, 40) and sample.fps == float("inf")


def test_a_picture_that_is_referred_to_is_read_upright(make_row, tmp_path) -> None:
    path = tmp_path / "20%: a #picture?.png"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (24, 40), "red").save(path, exif=exif)
    row = make_row(0, media="image", kind="reference") | {"source_uri": str(path)}
    sample = sample_of(row, Bucket("image", 1, 24, 40))
    assert sample.video.shape == (1, 3, 24, 40) and sample.fps == float("inf")
    assert (sample.video[0].permute(1, 2, 0).numpy() == (255, 0, 0)).all()
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=row["prompt_id"]):
        sample_of(row, Bucket("image", 1, 24, 40))


@pytest.mark.parametrize("kind", ["video", "reference"])
def test_a_target_that_names_other_files_opens_none(make_row, tmp_path, kind: str) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(make_row(2, kind="video")["target"]["data"])
    script = f"ffconcat version 1.0\n# é\nfile '{film.name}'\n".encode("latin-1")
    row = make_row(0, kind=kind)
    if kind == "video":
        row["target"]["data"] = script.replace(film.name.encode(), str(film).encode())
    else:
        (tmp_path / "clip.mp4").write_bytes(script)
        row["source_uri"] = str(tmp_path / "clip.mp4")
    with pytest.raises(DataError, match="no container that is read here"):
        sample_of(row)


def test_other_sizes_cover_and_crop() -> None:
    video = fit_frames(np.full((2, 60, 60, 3), 7, np.uint8), 24, 40)
    assert video.shape == (2, 24, 40, 3) and (video == 7).all()


def test_broken_target_names_its_prompt(make_row) -> None:
    row = make_row(0, kind="video")
    row["target"]["data"] = b"not a video"
    with pytest.raises(DataError, match=row["prompt_id"]):
        sample_of(row)
    row = make_row(0, kind="reference") | {"source_uri": "/nowhere.mp4"}
    with pytest.raises(DataError, match=row["prompt_id"]):
        sample_of(row)


def test_unknown_role_is_refused(make_row) -> None:
    row = make_row(0)
    row["segments"][0]["role"] = "villain"
    with pytest.raises(DataError, match="villain"):
        read_prompt(row)


def test_batch_is_scaled_to_one(make_row) -> None:
    import torch

    batch = collate([sample_of(make_row(n)) for n in range(3)])
    target = batch.target(torch.device("cpu"))
    assert target.shape == (3, 8, 3, 24, 40)
    assert target.min() >= -1 and target.max() <= 1
    assert ((target + 1) * 127.5).round().to(torch.uint8).equal(batch.video)


def test_rows_go_to_the_nearest_bucket(make_row) -> None:
    import pyarrow as pa

    buckets = (Bucket("video", 8, 24, 40), Bucket("video", 8, 40, 24), Bucket("image", 1, 24, 40))
    rows = [make_row(0), make_row(0, height=80, width=48), make_row(0, media="image")]
    table = pa.Table.from_pylist(rows, schema=PROMPTS)
    assert streams_of(table, buckets) == [(0, "pretrain"), (1, "pretrain"), (2, "pretrain")]
    assert streams_of(table, buckets[:1])[2] is None


def test_foreign_schema_is_refused() -> None:
    import pyarrow as pa

    with pytest.raises(ConfigError, match="missing columns"):
        check_schema(pa.schema([("a", pa.int32())]), "x.parquet")
