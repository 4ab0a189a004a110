"""Cutting: shots of a real detector, ranges that cover what they should, filters that count."""

from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from pipeline.clips.filters import FilterConfig, judge_by_facts, largest_change, load_plugins
from pipeline.clips.shots import find_shots, shot_ranges, split_long
from pipeline.clips.table import find_duplicates, near_pairs
from pipeline.media.phash import hamming
from pipeline.schema import Status


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_shots_are_ordered_disjoint_and_cover_every_unmarked_frame(changes):
    ranges = shot_ranges(np.array(changes))
    assert all(first <= last for first, last in ranges)
    assert all(a[1] < b[0] for a, b in pairwise(ranges))
    covered = {frame for first, last in ranges for frame in range(first, last + 1)}
    assert {frame for frame, change in enumerate(changes) if not change} <= covered


@given(st.floats(0, 100), st.floats(0.1, 500), st.floats(0.5, 60))
def test_long_shots_are_cut_into_equal_parts_without_gaps(start_s, length_s, max_s):
    parts = split_long(start_s, start_s + length_s, max_s)
    assert parts[0][0] == start_s
    assert parts[-1][1] == start_s + length_s
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert max(end - start for start, end in parts) <= max_s * (1 + 1e-6)


@pytest.mark.assets
@pytest.mark.slow
def test_transnet_finds_the_cuts_between_real_clips(assets, tmp_path):
    clips = sorted((assets / "panda" / "clips").glob("*.mp4"))[4:60:14]
    cuts_s, path = join_clips(clips, tmp_path / "joined.mp4")
    shots = find_shots(str(path))  # of two seconds each: none is cut for its length
    starts_s = [start for start, _ in shots][1:]
    for cut_s in cuts_s:
        assert min(abs(cut_s - start_s) for start_s in starts_s) <= 0.15


def join_clips(clips, path):
    """Two seconds of each clip, one after the other, at 25 frames per second."""
    cuts_s, number = [], 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 180, 320, "yuv420p"
        for clip in clips:
            cuts_s.append(number / 25)
            with av.open(str(clip)) as source:
                for count, frame in enumerate(source.decode(video=0)):
                    if count == 50:
                        break
                    picture = frame.reformat(320, 180, "rgb24").to_ndarray()
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                    number += 1
        container.mux(stream.encode())
    return cuts_s[1:], path


def row(**changes):
    values = {"media": "video", "caption": "x", "start_s": 0.0, "end_s": 3.0, "width_px": 320, "height_px": 180}
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, None),
        ({"caption": None}, Status.FILTERED_NO_CAPTION),
        ({"end_s": 0.2}, Status.FILTERED_TOO_SHORT),
        ({"end_s": 99.0}, Status.FILTERED_TOO_LONG),
        ({"height_px": 20}, Status.FILTERED_TOO_SMALL),
        ({"media": "image", "end_s": 0.0}, None),
    ],
)
def test_each_filter_gives_its_own_reason(changes, status):
    fate = judge_by_facts(row(**changes), FilterConfig(max_s=60))
    assert (fate[0] if fate else None) == status


def test_a_small_thing_that_moves_is_no_static_clip():
    frames = np.full((3, 64, 64, 3), 90, np.uint8)
    assert largest_change(frames) == 0
    frames[1, 8:14, 8:14] = 255
    assert largest_change(frames) > 50


def test_an_unknown_plug_in_is_refused_at_the_door():
    for name in ("nowhere:f", "math:nothing", "math"):
        with pytest.raises(ConfigError, match="plug-in"):
            load_plugins((name,))


@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.integers(0, 6), st.data())
def test_near_pairs_are_those_of_comparing_everything(hashes, bits, data):
    for base in list(hashes)[:6]:  # plant some near ones
        flips = data.draw(st.lists(st.integers(0, 63), max_size=8, unique=True))
        hashes.append(base ^ sum(1 << flip for flip in flips))
    found = {(a, b) for a, b, _ in near_pairs(np.array(hashes, np.uint64), bits)}
    expected = {
        (a, b)
        for a in range(len(hashes))
        for b in range(a)
        if hashes[a] and hashes[b] and hamming(hashes[a], hashes[b]) <= bits
    }
    assert found == expected


def test_the_first_of_equal_rows_is_kept_and_bad_rows_never_count():
    ids = ["aa" * 12, "bb" * 12, "aa" * 12, "aa" * 12]
    statuses = ["undecodable", "ok", "ok", "ok"]
    rows = [{"clip_id": i, "status": s} for i, s in zip(ids, statuses, strict=True)]
    assert {n: fate[0] for n, fate in find_duplicates(rows).items()} == {3: Status.FILTERED_DUPLICATE}
