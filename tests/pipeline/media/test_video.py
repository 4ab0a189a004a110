"""Frames at given times: whatever the layout of the file, those of a full decode."""

import ctypes
import io
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.sampling.film import encode_mp4
from pipeline.media.clip import cut_mp4
from pipeline.media.frames import clip_times, decode_frames, decode_from_start, opened, probe
from pipeline.media.plan import PlanError, planned_frames
from pipeline.schema import RowError, Status

LAYOUTS: dict[str, dict] = {
    "gop12": {"options": {"g": "12", "bf": "0"}, "num_frames": 80},
    "gop30_b": {"options": {"g": "30", "bf": "3"}, "num_frames": 100},
    "gop250_b": {"options": {"g": "250", "bf": "2"}, "num_frames": 120},
    "intra": {"options": {"g": "1"}, "num_frames": 40},
    "open_gop": {"options": {"g": "15", "bf": "3", "x264-params": "open-gop=1"}, "num_frames": 80},
    "pyramid": {"options": {"g": "40", "bf": "7", "x264-params": "b-pyramid=normal:ref=5"}, "num_frames": 90},
    "ntsc": {"fps": Fraction(30000, 1001), "options": {"g": "20"}, "num_frames": 60},
    "vfr": {"num_frames": 50, "options": {"g": "10", "bf": "2"}, "times": True},
    "late_start": {"num_frames": 50, "options": {"g": "10", "bf": "2"}, "times": True, "first_s": 3},
    "mpeg4": {"codec": "mpeg4", "num_frames": 60, "options": {"g": "15", "bf": "2"}},
    "hevc": {"codec": "libx265", "num_frames": 40, "options": {"x265-params": "keyint=12:log-level=none"}},
    "vp9": {
        "codec": "libvpx-vp9",
        "num_frames": 30,
        "options": {"g": "10", "cpu-used": "8"},
        "suffix": ".webm",
    },
    "mkv": {"num_frames": 60, "options": {"g": "20"}, "suffix": ".mkv"},
    "ts": {"num_frames": 60, "options": {"g": "20"}, "suffix": ".ts"},
    "avi": {"codec": "mpeg4", "num_frames": 40, "suffix": ".avi"},
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, write_video) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    made = {}
    for name, layout in LAYOUTS.items():
        layout = {**layout}
        suffix, first_s = layout.pop("suffix", ".mp4"), layout.pop("first_s", 0)
        if layout.get("times"):
            steps = np.random.default_rng(1).integers(1, 9, layout["num_frames"]).tolist()
            layout["times"] = [first_s + Fraction(sum(steps[:n]), 90) for n in range(len(steps))]
        made[name] = write_video(root / f"{name}{suffix}", size_px=(48, 64), **layout)
    return made


def full_decode(path: Path) -> tuple[list[float], np.ndarray]:
    """(seconds from the first frame, pixels) of every frame."""
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        frames = [f for f in container.decode(stream) if f.pts is not None]
        start = stream.start_time or 0
        times = [float((f.pts - start) * stream.time_base) for f in frames]
        return times, np.stack([f.to_ndarray(format="rgb24") for f in frames])


@pytest.mark.parametrize("name", LAYOUTS)
def test_sparse_frames_equal_those_of_a_full_decode(layouts, name):
    times, frames = full_decode(layouts[name])
    assert np.all(np.diff(times) > 0)
    rng = np.random.default_rng(0)
    for count in (1, 2, 8, 30):
        wanted = rng.uniform(-0.2, times[-1] + 0.5, count).tolist()
        slack = 0.0005 if name in ("vp9", "mkv") else 1e-5  # their times are rounded to milliseconds
        shown = [max(0, np.searchsorted(times, t + slack, side="right") - 1) for t in wanted]
        assert np.array_equal(decode_frames(layouts[name], wanted), frames[shown])
    assert np.array_equal(decode_frames(layouts[name], times), frames)  # each at its own time


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sparse_frames_equal_a_decode_from_the_start(layouts, data):
    name = data.draw(st.sampled_from(sorted(LAYOUTS)))
    wanted = data.draw(st.lists(st.floats(-1, 9), min_size=1, max_size=12))
    with opened(layouts[name]) as (_, stream):
        base, start = stream.time_base or Fraction(1), stream.start_time or 0
    slack = min(Fraction(1, 2), Fraction(1, 2000) / base)
    ticks = [math.floor(Fraction(max(t, 0)) / base + slack) + start for t in wanted]
    slow = decode_from_start(layouts[name], sorted(set(ticks)))
    assert np.array_equal(decode_frames(layouts[name], wanted), np.stack([slow[t] for t in ticks]))


@pytest.mark.parametrize("name", ["gop12", "gop30_b", "pyramid", "vfr", "late_start", "hevc", "mkv", "intra"])
def test_seekable_layouts_are_planned_not_streamed(layouts, name):
    with opened(layouts[name]) as (container, stream):
        start = stream.start_time or 0
        ticks = [start, start + 1, start + round(0.7 / (stream.time_base or 1))]
        assert sorted(tick for tick, _ in planned_frames(container, stream, ticks)) == ticks


def test_containers_without_an_index_are_streamed(layouts):
    with opened(layouts["ts"]) as (container, stream), pytest.raises(PlanError):
        list(planned_frames(container, stream, [0]))


@pytest.mark.parametrize("rotation_deg", [0, 90, 180, 270])
def test_rotation_of_the_container_is_applied(tmp_path, write_video, rotation_deg):
    corner = np.zeros((48, 64, 3), np.uint8)
    corner[:16, :16] = 255  # top left, as stored
    path = write_video(tmp_path / "a.mp4", size_px=(48, 64), frames=lambda _: corner, rotation_deg=rotation_deg)
    (frame,) = decode_frames(path, [0.1])
    expected = np.rot90(corner, rotation_deg // 90)
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 12
    info = probe(path)
    assert (info.height_px, info.width_px) == expected.shape[:2]


@pytest.mark.parametrize("colour_range", [1, 2])  # limited (16-235), full (0-255)
def test_colour_range_is_undone(tmp_path, write_video, colour_range):
    greys = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], 48, 0).repeat(3, 2)
    path = write_video(tmp_path / "a.mp4", size_px=(48, 64), frames=lambda _: greys, colour_range=colour_range)
    (frame,) = decode_frames(path, [0.0])
    assert np.abs(frame.astype(int) - greys).max() < 12


def test_paths_bytes_and_files_decode_alike(layouts):
    path = layouts["gop30_b"]
    reference = decode_frames(path, [0.5, 1.5], size_px=(24, 32))
    assert reference.shape == (2, 24, 32, 3)
    for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert np.array_equal(decode_frames(source, [0.5, 1.5], size_px=(24, 32)), reference)


def test_probe_measures_what_headers_say(layouts):
    info = probe(layouts["gop30_b"])
    assert (info.width_px, info.height_px, info.num_frames) == (64, 48, 100)
    assert (info.fps, info.duration_s) == (pytest.approx(30), pytest.approx(100 / 30, abs=0.01))


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", Status.EMPTY), (b"\0" * 4000, Status.UNDECODABLE), (b"hello" * 99, Status.UNDECODABLE)],
)
def test_what_is_no_video_says_so(data, status):
    with pytest.raises(RowError) as caught:
        probe(data)
    assert caught.value.status == status


def test_every_truncation_is_a_video_or_an_error_never_a_crash(layouts):
    data = layouts["gop12"].read_bytes()
    for size in range(1, len(data), max(1, len(data) // 60)):
        try:
            assert decode_frames(data[:size], [0.5]).shape == (1, 48, 64, 3)
        except RowError as error:
            assert error.status in (Status.UNDECODABLE, Status.NO_VIDEO)


def test_sound_alone_is_no_video(tmp_path, write_sound):
    with pytest.raises(RowError, match="no video stream, only audio") as caught:
        probe(write_sound(tmp_path / "a.mp4"))
    assert caught.value.status == Status.NO_VIDEO


@given(st.floats(0, 1e4), st.floats(0.1, 1e3), st.integers(1, 40))
def test_clip_times_lie_inside_the_clip_evenly(start_s, length_s, n):
    times = clip_times(start_s, start_s + length_s, n)
    assert len(times) == n
    assert start_s < times[0] and times[-1] < start_s + length_s
    assert np.allclose(np.diff(times), length_s / n)


@pytest.mark.parametrize("times", [[], [float("nan")], [0.0, float("inf")]])
def test_times_must_be_finite(layouts, times):
    with pytest.raises(ValueError, match="finite"):
        decode_frames(layouts["intra"], times)


M_PERTURB = -6
"""glibc's option whose value fills memory that is asked for: what reads it before it writes it shows."""


def over_garbage(encode: Callable[[], bytes]) -> set[bytes]:
    """What an encoder makes over different garbage in fresh memory."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) or pytest.skip("not glibc")
    made = set()
    for garbage in (0, 1, 170):
        mallopt(M_PERTURB, garbage)
        made.add(encode())
    mallopt(M_PERTURB, 0)
    return made


def test_the_same_frames_are_encoded_to_the_same_bytes(tmp_path, write_video) -> None:
    """Sides that are no multiples of 16: x264's macroblock tree reads memory there that nobody wrote."""
    places = np.arange(16)[:, None, None, None] * (5, 3, 7) + np.indices((36, 64)).sum(0)[..., None] * (3, 2, 1)
    frames = (places % 256).astype(np.uint8)
    path = write_video(
        tmp_path / "film.mp4", num_frames=16, fps=8, size_px=(36, 64), frames=lambda n: frames[n]
    )
    assert len(over_garbage(lambda: encode_mp4(frames, 8.0))) == 1
    assert len(over_garbage(lambda: cut_mp4(str(path), 0.0, 2.0, crf=18)["data"])) == 1
