"""The interface of a metric, and how intervals come about; the metrics themselves are in `metrics.py`.

    class Mine(MeanMetric):                 one number a video
        name, needs, better = "mine", ("clip",), "higher"
        def value(self, video, prompt): ...

    class Mine(Metric): update, compute     anything else

Features come from frozen networks (`networks.py`), video by video; what a metric needs by name is all that is
computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from infra.errors import DataError

FOLDS = 20
"""Parts that the jackknife leaves out, one after the other (ours)."""
RESAMPLES = 1000
"""Of a bootstrap (ours)."""
CONFIDENCE = 0.95
Z = 1.959964
"""Of a normal distribution, the middle of which holds `CONFIDENCE`."""
SMALL_N = 256
"""Fewer videos on a side give no Fréchet distance: two sets of one Gaussian of 400 dimensions are 2 to 3 times
as far apart at 30 as at 256, and 7 to 8 times at 256 as at 2,048 (tests/model/evaluate/test_frechet.py)."""
WARN_N = 2048
Features = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Video:
    """One video as its features.

    Attributes:
        name: unique among the videos of its side.
        features: by the names of their networks.
        is_real: of the set that is compared with.
        fold: which of `FOLDS` parts it belongs to.
    """

    name: str
    features: Features
    is_real: bool = False
    fold: int = 0


@dataclass(frozen=True)
class Score:
    """What a metric came to.

    Attributes:
        value: the number.
        interval: (low, high) at `CONFIDENCE`; None where it can't be told.
        n: sampled videos behind it.
        n_real: real ones; None where none are compared with.
        each: video -> its own value, for metrics that have one.
    """

    value: float
    interval: tuple[float, float] | None
    n: int
    n_real: int | None = None
    each: Mapping[str, float] = field(default_factory=dict)


class Metric(ABC):
    """Videos' features in, a score out. The order and the grouping of the calls of `update` can't be seen."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    """Networks whose features of the videos and their prompts it reads."""
    better: ClassVar[Literal["lower", "higher", "neither"]]
    needs_real: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    needs_references: ClassVar[bool] = False
    is_biased: ClassVar[bool] = False
    """Its value depends on n, so that few videos are refused."""

    @abstractmethod
    def update(self, videos: Sequence[Video], prompts: Sequence[Features]) -> None:
        """Take in some videos and the features of their prompts, in the same order."""

    @abstractmethod
    def compute(self) -> Score:
        """The score of all that was taken in.

        Raises:
            DataError: that is too little.
        """


class MeanMetric(Metric):
    """The mean over the sampled videos of a number that each has; a percentile bootstrap over the videos."""

    def __init__(self) -> None:
        self.each: dict[str, float] = {}

    def update(self, videos: Sequence[Video], prompts: Sequence[Features]) -> None:
        for video, prompt in zip(videos, prompts, strict=True):
            if not video.is_real and (value := self.value(video.features, prompt)) is not None:
                self.each[video.name] = value

    @abstractmethod
    def value(self, video: Features, prompt: Features) -> float | None:
        """Of one video; None where the metric says nothing of it, such as one without references."""

    def compute(self) -> Score:
        if not self.each:
            raise DataError("no video that it can say anything of")
        each = dict(sorted(self.each.items()))
        values = np.sort([*each.values()])  # by value: what the videos are called can't be seen
        return Score(float(values.mean()), bootstrap(values), len(values), each=each)


def bootstrap(values: np.ndarray) -> tuple[float, float] | None:
    """Percentile interval of the mean of `n` values; None below two."""
    if len(values) < 2:
        return None
    draw = np.random.default_rng(0)
    means = [float(values[draw.integers(len(values), size=len(values))].mean()) for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def jackknife(
    value: float, without: Callable[[int], float], sizes: Sequence[int]
) -> tuple[float, float] | None:
    """Interval of a biased statistic by leaving out one part of the videos after the other.

    A bootstrap draws videos twice, which a Fréchet distance takes for a smaller n: its whole interval would
    lie above the value. Leaving out a twentieth hardly moves the bias, and the same way each time. The interval
    is of the value at this n: how another draw would differ, not what infinitely many videos would give.

    `without`: fold -> the statistic of all others; `sizes`: videos of each fold, on the smaller side.
    """
    filled = [fold for fold, size in enumerate(sizes) if size]
    if len(filled) < 3:
        return None
    left = np.array([without(fold) for fold in filled])
    error = float(np.sqrt((len(left) - 1) / len(left) * np.square(left - left.mean()).sum()))
    return value - Z * error, value + Z * error


def rounded(values: np.ndarray) -> np.ndarray:
    """Multiples of 2⁻³⁰: millions of them below 8 add up exactly, in any order."""
    return np.round(np.asarray(values, np.float64) * 2.0**30) / 2.0**30


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of norm 1, float64."""
    rows = np.asarray(vectors, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True).clip(1e-12)
