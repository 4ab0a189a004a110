"""Standalone clips: the frames of the range, no more and no fewer, the same bytes each time."""

import numpy as np

from pipeline.clips.parent import InspectConfig, inspect_parent
from pipeline.clips.sources import Cut, Item
from pipeline.clips.transcode import write_clip
from pipeline.media.frames import decode_frames, probe


def test_a_standalone_clip_holds_exactly_the_frames_of_its_range(tmp_path, write_video):
    source = write_video(tmp_path / "a.mp4", num_frames=90, options={"g": "30", "bf": "2"})
    write_clip(str(source), 0.7, 2.0, str(tmp_path / "clip.mp4"))
    info = probe(tmp_path / "clip.mp4")
    assert (info.num_frames, round(info.fps)) == (39, 30)
    times = [n / 30 for n in range(39)]
    expected = decode_frames(source, [0.7 + t for t in times])
    found = decode_frames(tmp_path / "clip.mp4", times)
    errors = np.abs(found.astype(int) - expected).mean(axis=(1, 2, 3))
    neighbours = np.abs(found[:-1].astype(int) - expected[1:]).mean(axis=(1, 2, 3))
    assert errors.max() < 7 < 2 * neighbours.min()  # encoded again, but the same frames in the same places
    write_clip(str(source), 0.7, 2.0, str(tmp_path / "again.mp4"))
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "clip.mp4").read_bytes()


def test_good_clips_of_a_parent_become_files_named_by_their_ids(tmp_path, write_video):
    source = write_video(tmp_path / "a.mp4", num_frames=60)
    cuts = (Cut("one", 0.0, 1.0), Cut("two", 1.0, 2.0), Cut(None, 0.0, 1.0))
    config = InspectConfig(standalone=str(tmp_path / "standalone"))
    item = Item(str(source), "video", cuts).to_json()
    rows = inspect_parent(item, {"local_uri": str(source)}, config.model_dump_json())
    good = {row["clip_id"] for row in rows if row["status"] == "ok"}
    assert len(good) == 2
    assert {path.stem for path in (tmp_path / "standalone").iterdir()} == good
