"""Videos of any place are found, counted and decoded; hostile ones end as rows with a reason."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.certificate import Certificate, write_certificate
from infra.errors import ConfigError, DataError
from infra.samples import write_samples
from infra.storage import sha256_file
from model.sampling import film
from pipeline.evaluate.decode import FrameConfig, leading_frames, target_part
from pipeline.evaluate.videos import find_videos, listing_hash
from pipeline.evaluate.worker import EvaluateWorker, subjects
from pipeline.media.frames import decode_frames
from pipeline.schema import RowError
from tests.model.prompt_tables import prompt_row, write_shards
from tests.pipeline.conftest import WriteVideo, numbered_frame


class Recorder:
    """Stands where the trainer's networks do: keeps the frames that it is shown."""

    def __init__(self, *, reads_pictures: bool = True) -> None:
        self.seen: dict[str, np.ndarray] = {}
        self.reads_pictures = reads_pictures

    def video_keys(self, video_id: str, words: Sequence[str], only: Collection[str] | None) -> dict[str, str]:
        return {"frames": video_id}

    def missing(self, keys: dict[str, str]) -> list[str]:
        return [name for name, key in keys.items() if key not in self.seen]

    def video(
        self, keys: dict[str, str], missing: Sequence[str], frames: np.ndarray, words: Sequence[str]
    ) -> None:
        self.seen[keys["frames"]] = frames

    def text(self, text: str) -> dict[str, str]:
        return {"text": text}

    def references(self, pictures: Sequence[bytes]) -> dict[str, str]:
        return {"references": str(len(pictures))} if pictures else {}


@pytest.fixture
def worker_of() -> Iterator[Callable[..., EvaluateWorker]]:
    """Makes workers, and ends their decoders' processes."""
    made: list[EvaluateWorker] = []

    def make(recorder: Recorder | None = None, num_frames: int = 4) -> EvaluateWorker:
        how = FrameConfig(num_frames=num_frames)
        made.append(EvaluateWorker(lambda: recorder or Recorder(), how, timeout_s=60))
        return made[-1]

    yield make
    for worker in made:
        worker.child.close()


@pytest.fixture
def hostile(tmp_path: Path, write_video: WriteVideo, write_sound: WriteVideo) -> Path:
    folder = tmp_path / "videos"
    write_video(folder / "good.mp4", num_frames=20)
    write_video(folder / "one_frame.mp4", num_frames=1)
    large = np.full((2160, 3840, 3), 90, np.uint8)
    write_video(folder / "4k.mp4", num_frames=4, size_px=large.shape[:2], frames=lambda n: large)
    write_sound(folder / "sound.m4a")
    whole = (folder / "good.mp4").read_bytes()
    (folder / "corrupt.mp4").write_bytes(whole[:200] + bytes(len(whole) - 200))
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "script.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (folder / "notes.txt").write_text("no video")
    return folder


def test_hostile_files_are_counted_and_named(hostile: Path, worker_of: Any) -> None:
    recorder = Recorder()
    worker = worker_of(recorder)
    found = {payload["name"]: worker(payload) for payload in find_videos(str(hostile))}
    fates = {name: receipt["status"] for name, receipt in found.items()}
    assert fates == {
        "4k.mp4": "ok",
        "corrupt.mp4": "undecodable",
        "cut.mp4": "undecodable",
        "empty.mp4": "empty",
        "good.mp4": "ok",
        "one_frame.mp4": "filtered_too_short",
        "script.mp4": "undecodable",
        "sound.m4a": "no_video",
    }
    assert all(receipt["error"] for receipt in found.values() if receipt["status"] != "ok")
    assert recorder.seen[found["4k.mp4"]["id"]].shape == (4, 2160, 3840, 3)


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no video")
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ConfigError, match=r"no video in .*legal: a folder of video files"):
            find_videos(str(place))


def test_what_is_no_file_is_counted_and_named_and_no_folder_twice(
    tmp_path: Path, write_video: WriteVideo, worker_of: Any
) -> None:
    folder = tmp_path / "videos"
    write_video(folder / "good.mp4", num_frames=4)
    (folder / "link.mp4").symlink_to("good.mp4")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(folder / "notes.txt")  # is not meant to be a video
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"video")
    found = {payload["name"]: worker_of()(payload) for payload in find_videos(str(folder))}
    assert {name: receipt["status"] for name, receipt in found.items()} == {
        **dict.fromkeys(("again", "caf\\xe9.mp4", "gone.mp4", "pipe.mp4"), "unreachable"),
        **dict.fromkeys(("good.mp4", "link.mp4"), "ok"),
    }
    assert "not followed" in found["again"]["error"] and "UTF-8" in found["caf\\xe9.mp4"]["error"]
    assert "leads nowhere" in found["gone.mp4"]["error"] and "a pipe" in found["pipe.mp4"]["error"]
    assert listing_hash(find_videos(str(folder))) == listing_hash(find_videos(str(folder)))


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path, write_video: WriteVideo) -> None:
    video = write_video(tmp_path / "one.mp4", num_frames=4)
    with pytest.raises(ConfigError, match=r"one\.mp4 is a file; legal: a folder .*; cure: give the folder"):
        find_videos(str(video))


def test_the_first_frames_are_scored(tmp_path: Path, write_video: WriteVideo) -> None:
    video = str(write_video(tmp_path / "a.mp4", num_frames=30, fps=30))
    whole = decode_frames(video, [n / 30 for n in range(30)])
    assert np.array_equal(leading_frames(video, 16), whole[:16])
    assert np.array_equal(leading_frames(video, 10, stride=3), whole[:30:3])
    assert np.array_equal(leading_frames(video, 8, fps=10), whole[:24:3])
    assert np.array_equal(leading_frames(video, 5, start_s=0.5, end_s=0.8), whole[15:20])
    options: dict[str, Any]
    for options in ({"stride": 2}, {"fps": 15.0}, {"start_s": 0.6, "end_s": 0.9}, {"start_s": 0.6}):
        with pytest.raises(RowError, match="16 are scored"):
            leading_frames(video, 16, **options)


def test_a_target_is_taken_as_a_video_is() -> None:
    frames = np.stack([numbered_frame(n, (8, 8)) for n in range(12)])
    assert np.array_equal(target_part(frames, 24, FrameConfig(num_frames=6, stride=2)), frames[::2])
    assert np.array_equal(target_part(frames, 24, FrameConfig(num_frames=4, fps=8)), frames[::3])
    with pytest.raises(RowError, match="12 frames, 13 are scored"):
        target_part(frames, 24, FrameConfig(num_frames=13))


def test_prompts_lie_beside_the_videos(tmp_path: Path, write_video: WriteVideo, worker_of: Any) -> None:
    write_video(tmp_path / "a.mp4", num_frames=2)
    write_video(tmp_path / "b.mp4", num_frames=2)
    Image.new("RGB", (8, 8)).save(tmp_path / "dog.png")
    lines: list[dict[str, Any]] = [
        {"video": "a.mp4", "prompt": "A <image> runs.", "images": ["dog.png", "background:yard.png"]},
        {"video": "b.mp4", "prompt": "A <image> sits.", "text": "A cat sits."},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one, two = find_videos(str(tmp_path))
    assert one["prompt"] == {"text": "A runs.", "references": [str(tmp_path / "dog.png")], "words": []}
    assert two["prompt"] == {"text": "A cat sits.", "references": [], "words": []}
    worker = worker_of(num_frames=2)
    assert worker(one)["prompt"] == {"text": "A runs.", "references": "1"}
    assert worker(one)["references"] == [sha256_file(str(tmp_path / "dog.png"))]
    assert worker(two)["references"] == []
    (tmp_path / "dog.png").unlink()
    assert worker(one)["status"] == "bad_row"
    assert worker_of(Recorder(reads_pictures=False), num_frames=2)(one)["status"] == "ok"  # nobody looks at it
    for bad in ('{"video": "c.mp4", "prompt": "x"}', "{}", "[]", "no json"):
        (tmp_path / "prompts.jsonl").write_text(bad)
        with pytest.raises(ConfigError, match="line 1"):
            find_videos(str(tmp_path))


@pytest.mark.parametrize("letter", ["\u2028", "\x85", "\x0b", "\x0c"])
def test_a_prompt_may_hold_any_line_separator_of_unicode(
    tmp_path: Path, write_video: WriteVideo, letter: str
) -> None:
    write_video(tmp_path / "a.mp4", num_frames=2)
    raw = letter if letter >= "\x20" else json.dumps(letter)[1:-1]  # JSON wants control characters escaped
    lines = f'{{"video": "a.mp4", "prompt": "x", "text": "one{raw}two"}}\r\n\r\n'
    (tmp_path / "prompts.jsonl").write_bytes(lines.encode())
    assert find_videos(str(tmp_path))[0]["prompt"]["text"] == f"one{letter}two"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"video": "a.mp4", "prompt": "x", "words": 7}', "words = 7: Input should be a valid array"),
        ('{"video": "a.mp4", "prompt": "x", "images": "dog.png"}', "images = 'dog.png'"),
        ('{"video": "a.mp4", "prompt": "x", "images": [3]}', r"images\.0 = 3"),
        ('{"video": ["a.mp4"], "prompt": "x"}', r"video = \['a.mp4'\]"),
        ('{"video": "a.mp4", "prompt": "x", "text": 5}', "text = 5: Input should be a valid string"),
        ('{"video": "a.mp4", "prompt": "x", "text": "\\ud800"}', "hex escape"),
        ('{"video": "a.mp4"}', "neither prompt nor text"),
    ],
)
def test_a_line_of_other_types_is_refused_with_what_is_legal(
    tmp_path: Path, write_video: WriteVideo, line: str, said: str
) -> None:
    write_video(tmp_path / "a.mp4", num_frames=2)
    (tmp_path / "prompts.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=rf"line 2: .*{said}.*; legal: .*prompt"):
        find_videos(str(tmp_path))


def test_a_second_prompt_of_a_video_is_refused(tmp_path: Path, write_video: WriteVideo) -> None:
    write_video(tmp_path / "a.mp4", num_frames=2)
    lines = [json.dumps({"video": "a.mp4", "prompt": prompt}) for prompt in ("x", "y")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"line 2: a second prompt of 'a\.mp4'; legal: .*; cure: "):
        find_videos(str(tmp_path))


def test_a_folder_of_samples_brings_its_prompts(tmp_path: Path, write_video: WriteVideo) -> None:
    write_video(tmp_path / "sample-000.mp4", num_frames=2)
    segments = [
        {"type": "text", "role": "instruction", "text": "Generate a video.", "picture": None},
        {"type": "text", "role": "caption", "text": "A", "picture": None},
        {"type": "image", "role": "subject", "text": "dog", "picture": "sample-000-subject-1.png"},
        {"type": "text", "role": "caption", "text": "runs.", "picture": None},
    ]
    entry = {"video": "sample-000.mp4", "prompt": "A <subject> runs.", "segments": segments}
    write_samples(str(tmp_path), [entry])
    (found,) = find_videos(str(tmp_path))
    assert found["prompt"]["text"] == "A dog runs."
    assert found["prompt"]["references"] == [str(tmp_path / "sample-000-subject-1.png")]
    assert subjects(found["prompt"]) == ["dog"] and subjects({"references": ["a", "b"], "words": ["dog"]}) == []


def test_a_sample_is_scored_at_the_size_that_it_was_made_at(tmp_path: Path, worker_of: Any) -> None:
    made = np.stack([numbered_frame(5 * n, (18, 21)) for n in range(4)])  # the file is 314 pixels wide, not 315
    said, _ = film.write_video(str(tmp_path), "sample-000", made, 8)
    write_samples(str(tmp_path), [{**said, "prompt": "A dog.", "segments": []}])
    (found,) = find_videos(str(tmp_path))
    recorder = Recorder()
    receipt = worker_of(recorder)(found)
    assert found["scale"] == 15
    seen = recorder.seen[receipt["id"]]
    assert seen.shape == made.shape and np.abs(seen.astype(int) - made).mean() < 4
    assert receipt["id"] != worker_of()({**found, "scale": 1})["id"]  # other features in the cache


def test_samples_that_lost_their_list_are_not_anybodys_videos(tmp_path: Path, write_video: WriteVideo) -> None:
    write_video(tmp_path / "sample-000.mp4", num_frames=5)
    write_certificate(tmp_path, Certificate(job="sample", config_hash="0", num_in=1, num_out=1))
    with pytest.raises(DataError, match=r"samples\.json; cure"):
        find_videos(str(tmp_path))


def test_targets_of_shards_are_real_videos(tmp_path: Path, worker_of: Any) -> None:
    rows = [prompt_row(n, num_frames=6, height=12, width=16) for n in range(7)]
    shards = write_shards(tmp_path / "prompts", rows, job="augment", group_rows=4, file_rows=4)
    found = find_videos(str(shards))
    videos = {row["prompt_id"]: row for row in rows if row["media"] == "video"}
    assert {payload["name"] for payload in found} == set(videos)
    recorder = Recorder()
    worker = worker_of(recorder)
    for payload in found:
        receipt = worker(payload)
        target = videos[payload["name"]]["target"]
        frames = np.frombuffer(target["data"], np.uint8).reshape(6, 12, 16, 3)
        assert np.array_equal(recorder.seen[receipt["id"]], frames[:4])
    some = [rows[5]["prompt_id"], rows[2]["prompt_id"]]
    assert {payload["name"] for payload in find_videos(str(shards), only=some)} == set(some)


def test_the_same_bytes_in_another_shape_are_another_video(tmp_path: Path, worker_of: Any) -> None:
    rows = [prompt_row(n, num_frames=6, height=h, width=w) for n, (h, w) in enumerate(((12, 16), (16, 12)))]
    for row in rows:
        row["target"]["data"] = bytes(len(row["target"]["data"]))
    rows.append(rows[0] | {"prompt_id": "slow", "clip_id": "slow"})
    rows[2]["target"] = rows[0]["target"] | {"fps": 4.0}
    shards = write_shards(tmp_path / "prompts", rows, job="augment", group_rows=4, file_rows=4)
    worker = worker_of()
    assert len({worker(payload)["id"] for payload in find_videos(str(shards))}) == 3


def test_a_clip_counts_once_however_many_tasks_carry_its_frames(tmp_path: Path) -> None:
    rows = [prompt_row(n, task=task) for n in range(2) for task in ("pretrain", "subject_driven")]
    rows += [prompt_row(0, task="text_to_video") | {"start_s": 1.0, "end_s": 2.0}]  # another part of it
    shards = write_shards(tmp_path / "prompts", rows, job="instruct", group_rows=2, file_rows=4)
    assert [p["name"] for p in find_videos(str(shards))] == sorted(rows[n]["prompt_id"] for n in (0, 2, 4))


def test_a_changed_folder_has_another_hash(tmp_path: Path, write_video: WriteVideo) -> None:
    write_video(tmp_path / "a.mp4", num_frames=2)
    before = listing_hash(find_videos(str(tmp_path)))
    assert listing_hash(find_videos(str(tmp_path))) == before
    write_video(tmp_path / "b.mp4", num_frames=2)
    assert listing_hash(find_videos(str(tmp_path))) != before


def test_a_video_or_reference_of_equal_size_in_its_place_has_another_hash(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    video, picture = write_video(tmp_path / "a.mp4", num_frames=2), tmp_path / "dog.png"
    picture.write_bytes(b"dog")
    line = {"video": "a.mp4", "prompt": "A <image>.", "images": ["dog.png"]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    hashes = [listing_hash(find_videos(str(tmp_path)))]
    for place in (video, picture):
        data, before_ns = bytearray(place.read_bytes()), place.stat().st_mtime_ns
        data[-1] ^= 1
        place.write_bytes(data)
        os.utime(place, ns=(before_ns, before_ns + 1_000_000_000))  # some disks count in seconds
        hashes.append(listing_hash(find_videos(str(tmp_path))))
    assert len(set(hashes)) == 3
