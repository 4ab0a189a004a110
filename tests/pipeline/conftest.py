"""Real media files, made when a test asks for them: every frame says which one it is."""

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

WriteVideo = Callable[..., Path]


def numbered_frame(number: int, size_px: tuple[int, int] = (96, 128), seed: int = 0) -> np.ndarray:
    """A picture of many random waves that slides along with its number; `seed` makes another film."""
    return np.roll(_waves(size_px, seed), 5 * number, axis=1)


@lru_cache(maxsize=64)
def _waves(size_px: tuple[int, int], seed: int) -> np.ndarray:
    height, width = size_px
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
    total = np.zeros((height, width, 3))
    for _ in range(32):
        fy, fx, phase = *rng.normal(0, 3, 2), rng.uniform(0, 6.3)
        total += np.cos(6.3 * (fy * y + fx * x) + phase)[..., None] * rng.normal(0, 1, 3)
    return np.clip(128 + 30 * total, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    """Writes a real encoded video and gives back its path."""

    def write(
        path: Path,
        *,
        num_frames: int = 30,
        fps: int = 30,
        size_px: tuple[int, int] = (96, 128),
        codec: str = "libx264",
        options: dict[str, str] | None = None,
        seed: int = 0,
        pix_fmt: str = "yuv420p",
        times: list[Fraction] | None = None,
        frames: Callable[[int], np.ndarray] | None = None,
        rotation_deg: int = 0,
        sound: bool = False,
        gop: int | None = None,
        colour_range: int | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=fps, options=options or {})
            stream.height, stream.width, stream.pix_fmt = *size_px, pix_fmt
            if gop:
                stream.codec_context.gop_size = gop
            if colour_range:
                stream.codec_context.color_range = colour_range
            if rotation_deg:
                stream.set_display_rotation(rotation_deg)
            if times:
                stream.codec_context.time_base = Fraction(1, 90000)
            if sound:
                _add_sound(container, num_frames / fps)
            for number in range(num_frames):
                picture = frames(number) if frames else numbered_frame(number, size_px, seed)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if colour_range:
                    frame = frame.reformat(format=pix_fmt, dst_color_range=colour_range)
                if times:
                    frame.time_base = Fraction(1, 90000)
                    frame.pts = round(times[number] * 90000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


def _add_sound(container: Any, duration_s: float) -> None:
    stream = container.add_stream("aac", rate=16000)
    stream.layout = "mono"
    for start in range(0, int(duration_s * 16000), 1024):
        wave = (8000 * np.sin(np.arange(start, start + 1024) / 9)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


@pytest.fixture(scope="session")
def write_sound() -> WriteVideo:
    """Writes a file with sound and no picture."""

    def write(path: Path) -> Path:
        with av.open(str(path), "w") as container:
            _add_sound(container, 1.0)
        return path

    return write


@pytest.fixture(scope="session")
def write_picture() -> WriteVideo:
    """Writes a real picture file, its format by its name."""

    def write(path: Path, *, seed: int = 0, size_px: tuple[int, int] = (96, 128), **options: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbered_frame(seed * 7, size_px, seed)).save(path, **options)
        return path

    return write
