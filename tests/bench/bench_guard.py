"""Are planted copies caught, and are strangers let through? On real clips.

python tests/bench/bench_guard.py --assets ../shared/assets [--skip 20] [--clips 80]

Each Panda clip is planted seven ways, each time really encoded again: re-encoded at half size, cropped,
trimmed, mirrored, sped up, watermarked, and mirrored + cropped. Strangers are all other Panda clips, the
MSR-VTT frames and the DROID clips of other scenes. The guard sees what a memory stores: the perceptual
hash of the middle frame and the mini-CLIP's picture vector; sources are all different on purpose. The
bounds were chosen on the first 20 clips: they are left out unless asked for. Copies are 360 lines high.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from infra.clip import Clip, load_clip
from pipeline.media.frames import clip_times, decode_frames, probe
from pipeline.media.phash import phash64
from pipeline.memory.vectors import frame_mean
from pipeline.prompts.augment.target import GUARD_FRAMES
from pipeline.prompts.guard import (
    GuardConfig,
    GuardedClip,
    GuardedDocuments,
    Verdict,
    frame_hashes,
    judge,
    similarity_bound,
)
from tests.infra.tiny_clips import mini_clip

KEY_FRAMES = 4
BOUNDS: tuple[tuple[int, float | None], ...]
BOUNDS = ((10, None), (10, 1.0), (12, 1.0), (-1, 0.9), (10, 0.9), (12, 0.9), (14, 0.9), (10, 0.85))
"""Perceptual hash bits and cosine; None = the cosine that the memory's own pairs of strangers give."""
Look = tuple[np.ndarray, int]  # unit vector, perceptual hash
Frames = np.ndarray  # uint8 t h w 3


def crop(frames: Frames, keep: float = 0.8) -> Frames:
    height, width = frames.shape[1:3]
    top, left = round(height * (1 - keep) * 0.5), round(width * (1 - keep) * 0.5)
    return frames[:, top : top + round(height * keep), left : left + round(width * keep)]


def watermark(frames: Frames) -> Frames:
    marked = frames.copy()
    height, width = frames.shape[1:3]
    box = marked[:, -height // 6 :, -width // 3 :]
    box[:] = (box * 0.4 + 255 * 0.6).astype(np.uint8)
    box[:, :: max(2, height // 24)] = 20
    return marked


PLANTS: dict[str, Callable[[Frames], Frames]] = {
    "re-encoded, half size": lambda f: f[:, ::2, ::2],
    "cropped to 80 %": crop,
    "trimmed by 30 %": lambda f: f[round(len(f) * 0.3) :],
    "mirrored": lambda f: f[:, :, ::-1],
    "twice as fast": lambda f: f[::2],
    "watermarked": watermark,
    "mirrored, cropped to 90 %": lambda f: crop(f[:, :, ::-1], 0.9),
}


def encode(frames: Frames, fps: int = 12) -> bytes:
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "33", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return sink.getvalue()


def look(video: str | bytes, clip: Clip | None) -> Look:
    """What build-index and crawl store of a clip."""
    duration_s = probe(video).duration_s
    frames = decode_frames(video, clip_times(0.0, duration_s, KEY_FRAMES))
    middle = decode_frames(video, clip_times(0.0, duration_s, 1))[0]
    return picture_vector(list(frames), clip), phash64(middle)


def picture_vector(frames: list[np.ndarray], clip: Clip | None) -> np.ndarray:
    if clip is None:
        return np.zeros(1, np.float32)  # similar to nothing
    return frame_mean(clip.encode_images(frames), [len(frames)])[0]


def strangers(assets: Path, clip: Clip | None, pictures: int) -> list[Look]:
    table = pq.read_table(assets / "msrvtt/train.parquet", columns=["image"]).slice(0, pictures)
    found: list[Look] = []
    for value in table["image"].to_pylist():
        data = value["bytes"] if isinstance(value, dict) else value
        rgb = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        found.append((picture_vector([rgb], clip), phash64(rgb)))
    droid = [json.loads(line) for line in (assets / "droid/captions.jsonl").open()]
    for row in list({(r["scene"], r["lab"]): r for r in droid}.values())[:40]:
        found.append(look(str(assets / "droid" / row["clip"]), clip))
    return found


def documents(looks: list[Look]) -> GuardedDocuments:
    count = len(looks)
    return GuardedDocuments(
        shas=np.arange(1, count + 1).astype(np.uint64),
        sources=np.arange(1, count + 1).astype(np.uint64),
        start_s=np.zeros(count),
        end_s=np.ones(count),
        phashes=np.array([phash for _, phash in looks], np.uint64),
        vectors=np.stack([vector for vector, _ in looks]).astype(np.float16),
        evaluation=np.zeros(count, bool),
    )


def guarded(own: Look, hashes: tuple[int, ...]) -> GuardedClip:
    """The clip as augment sees it: with hashes of frames over its whole length."""
    return GuardedClip(1 << 40, 1 << 40, 0.0, 1.0, np.array([own[1], *hashes], np.uint64), own[0])


def all_hashes(path: str) -> tuple[int, ...]:
    times_s = clip_times(0.0, probe(path).duration_s, GUARD_FRAMES)
    return frame_hashes(decode_frames(path, times_s, size_px=(72, 128)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--skip", type=int, default=20)
    parser.add_argument("--clips", type=int, default=80)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--hashes-only", action="store_true", help="no CLIP: quick")
    options = parser.parse_args()
    assets = options.assets.resolve()
    clip = (
        None
        if options.hashes_only
        else load_clip(mini_clip(assets / "weights", Path("/tmp"), context_length=64))
    )
    paths = sorted((assets / "panda/clips").glob("*.mp4"))[options.skip :][: options.clips]
    own, hashes, planted = [], [], {name: [] for name in PLANTS}
    for path in paths:
        own.append(look(str(path), clip))
        hashes.append(all_hashes(str(path)))
        duration_s = probe(str(path)).duration_s
        times_s = clip_times(0.0, duration_s, round(duration_s * 12))
        width_px = round(360 * probe(str(path)).width_px / probe(str(path)).height_px)
        frames = decode_frames(str(path), times_s, size_px=(360, width_px))
        for name, change in PLANTS.items():
            planted[name].append(look(encode(change(frames)), clip))
    other = strangers(assets, clip, options.pictures)
    copies, each = len(own) * len(PLANTS), len(own) - 1 + len(other)
    print(f"{len(own)} clips, {copies} planted copies, {len(own)} x {each} strangers")
    sources = [path.name.split(".")[0] for path in paths]
    for bits, similarity in BOUNDS:
        config = GuardConfig(max_hash_bits=bits, max_similarity=similarity)
        measure(config, own, hashes, planted, other, sources)


def measure(
    config: GuardConfig,
    own: list[Look],
    hashes: list[tuple[int, ...]],
    planted: dict[str, list[Look]],
    other: list[Look],
    sources: list[str],
) -> None:
    caught = {}
    calibrated = config.max_similarity is None
    measured = similarity_bound(config, documents([*own, *other]))
    config = config.model_copy(update={"max_similarity": measured})
    for name, looks in planted.items():
        known = documents(looks)
        verdicts = [judge(config, guarded(own[i], hashes[i]), known, np.array([i]))[0] for i in range(len(own))]
        caught[name] = sum(v != Verdict.ALLOWED for v in verdicts)
    known, refused = documents([*own, *other]), 0
    for i, mine in enumerate(own):
        verdicts = judge(config, guarded(mine, hashes[i]), known, np.arange(len(own) + len(other)))
        alike = [j for j in np.flatnonzero(verdicts) if j >= len(own) or sources[j] != sources[i]]
        refused += len(alike)
    hits, total = sum(caught.values()), len(own) * len(planted)
    print(
        f"hash <= {config.max_hash_bits:2} bits, cosine > {config.max_similarity:.3f}"
        f"{' (measured)' * calibrated}: "
        f"recall {hits / total:.3f}, precision {hits / max(hits + refused, 1):.3f} "
        f"({refused} strangers refused)"
    )
    print("   " + ", ".join(f"{name} {count / len(own):.2f}" for name, count in caught.items()))


if __name__ == "__main__":
    main()
